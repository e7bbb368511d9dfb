use std::{path::PathBuf, sync::LazyLock};

/// A folder for one process; on Linux it never touches a disk. Statics are not dropped, so it stays behind.
pub static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let memory = PathBuf::from("/dev/shm");
    let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("rlflow-fuzz").tempdir_in(parent).expect("a folder can be made")
});
