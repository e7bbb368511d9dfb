//! File systems that are really full, read-only or can make reflinks. The engine's tests use them too.

use std::{path::Path, process::Command};

use tempfile::TempDir;

use super::forks::quiet_status;

/// A file system of its own, unmounted when dropped. `None` where this user may not mount one.
pub struct Mounted(TempDir);

impl Mounted {
    pub fn tmpfs(size_bytes: u64) -> Option<Self> {
        Self::mount(&["-t", "tmpfs", "-o", &format!("size={size_bytes}"), "tmpfs"])
    }

    /// One that can make reflinks, in a sparse file that is unlinked at once.
    #[allow(dead_code)]
    pub fn with_reflinks() -> Option<Self> {
        let image = tempfile::NamedTempFile::new().ok()?;
        // The smallest that both make.
        image.as_file().set_len(512 << 20).ok()?;
        let path = image.path().to_str()?;
        let made = ["mkfs.btrfs", "mkfs.xfs"].into_iter().find(|make| quiet(Command::new(make).args(["-q", path])))?;
        let kind = made.strip_prefix("mkfs.")?;
        Self::mount(&["-t", kind, "-o", "loop", path])
    }

    fn mount(arguments: &[&str]) -> Option<Self> {
        let folder = tempfile::tempdir().ok()?;
        quiet(Command::new("mount").args(arguments).arg(folder.path())).then_some(Self(folder))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Changes its options while it is in use.
    pub fn remount(&self, options: &str) {
        assert!(
            quiet(Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(self.path())),
            "remounting with {options} failed"
        );
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily, so that a file that is still open does not keep it for ever.
        quiet(Command::new("umount").arg("-l").arg(self.path()));
    }
}

fn quiet(command: &mut Command) -> bool {
    quiet_status(command).is_ok_and(|status| status.success())
}
