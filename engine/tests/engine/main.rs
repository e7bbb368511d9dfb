//! The engine from workflow file to stored results, with small stage kinds.

mod commands;
mod concurrency;
mod failures;
#[path = "../../../store/tests/store/forks.rs"]
mod forks;
mod fuzz;
mod hostile;
mod identity;
mod kinds;
#[path = "../../../store/tests/store/mounted.rs"]
mod mounted;
mod reruns;
mod settled;
mod vary;
mod world;
