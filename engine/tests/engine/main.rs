//! The engine from workflow file to stored results, with small stage kinds.

mod concurrency;
mod failures;
mod kinds;
mod reruns;
mod world;
