//! Values of the index: versioned, checked, of fixed width.

use crate::{Digest, Hasher};

/// Version of the values' layout.
pub(crate) const ENVELOPE: u8 = 1;

/// `[version, 8 bytes of BLAKE3(key, payload), payload]`.
pub(crate) fn wrap_envelope(key: Digest, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(9 + payload.len());
    bytes.push(ENVELOPE);
    bytes.extend_from_slice(&check_bytes(key, payload));
    bytes.extend_from_slice(payload);
    bytes
}

pub(crate) fn unwrap_envelope(key: Digest, bytes: &[u8]) -> Option<Vec<u8>> {
    let payload = bytes.get(9..)?;
    (bytes[0] == ENVELOPE && bytes[1..9] == check_bytes(key, payload)).then(|| payload.to_vec())
}

fn check_bytes(key: Digest, payload: &[u8]) -> [u8; 8] {
    let digest = Hasher::new().update(key.as_bytes()).update(payload).finish();
    digest.as_bytes()[..8].try_into().expect("a digest has more than 8 bytes")
}

/// Reads fixed-width big-endian values off the front of a payload.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(head)
    }

    pub fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.bytes(8)?.try_into().ok()?))
    }

    pub fn i128(&mut self) -> Option<i128> {
        Some(i128::from_be_bytes(self.bytes(16)?.try_into().ok()?))
    }

    pub fn digest(&mut self) -> Option<Digest> {
        Some(Digest::from_bytes(self.bytes(32)?.try_into().ok()?))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
