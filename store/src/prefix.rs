//! Digests by their beginning, as people copy them from tables.

use crate::{Digest, Result, Store, layout::Family};

/// Fewer digits than this name nothing.
const MIN_DIGITS: usize = 4;

impl Store {
    /// Digests of artifacts that begin with `digits` (lower-case hexadecimal, at least four), ascending.
    pub fn artifacts_beginning(&self, digits: &str) -> Result<Vec<Digest>> {
        self.beginning(Family::Manifest, digits)
    }

    /// Keys of actions that begin with `digits` (lower-case hexadecimal, at least four), ascending.
    pub fn actions_beginning(&self, digits: &str) -> Result<Vec<Digest>> {
        self.beginning(Family::Action, digits)
    }

    fn beginning(&self, family: Family, digits: &str) -> Result<Vec<Digest>> {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if digits.len() < MIN_DIGITS || !digits.bytes().all(is_digit) {
            return Ok(Vec::new());
        }
        let mut found = self.list_family(family)?;
        found.retain(|digest| digest.to_string().starts_with(digits));
        found.sort_unstable();
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use crate::Store;

    #[test]
    fn artifacts_are_found_by_their_first_digits() -> Result<(), Box<dyn Error>> {
        let folder = tempfile::tempdir()?;
        let store = Store::open(folder.path())?;
        let digest = store.artifact("text").publish()?.digest();
        let text = digest.to_string();
        assert_eq!(store.artifacts_beginning(&text[..4])?, [digest]);
        assert_eq!(store.artifacts_beginning(&text)?, [digest]);
        assert_eq!(store.artifacts_beginning(&text[..3])?, []);
        assert_eq!(store.artifacts_beginning("zzzz")?, []);
        assert_eq!(store.actions_beginning(&text[..8])?, []);
        Ok(())
    }
}
