use std::fmt;

use rlflow_store::Digest;

/// Which part of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// What models are trained on.
    Train,
    /// What they never see before they are measured on it.
    HeldOut,
}

impl Split {
    /// Entry of an artifact that lists the split's rows.
    pub const fn entry(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::HeldOut => "heldout",
        }
    }

    /// The split of a row with this content when `heldout` is the share held out. It depends on nothing else, so that
    /// a row stays where it is when others are added, removed or reordered.
    pub fn of(content: Digest, heldout: f64) -> Self {
        let bits = u64::from_be_bytes(content.as_bytes()[..8].try_into().expect("a digest has 32 bytes"));
        // 53 bits: exactly what an f64 between 0 and 1 can tell apart.
        let position = (bits >> 11) as f64 / (1u64 << 53) as f64;
        if position < heldout { Self::HeldOut } else { Self::Train }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Train => "train",
            Self::HeldOut => "held-out",
        })
    }
}
