//! The rlflow command.
fn main() {}
