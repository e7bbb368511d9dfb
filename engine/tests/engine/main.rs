//! The engine from workflow file to stored results, with small stage kinds.

mod commands;
mod concurrency;
mod failures;
mod identity;
mod kinds;
mod reruns;
mod vary;
mod world;
