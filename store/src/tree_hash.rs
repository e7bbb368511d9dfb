//! Reading a file once: every core reads and hashes pieces of its own.
//!
//! BLAKE3 is a tree over chunks, so pieces of a power of two of chunks are hashed in any order and merged afterwards.
//! Reading is nearly as fast as mapping, and a file that others cut short is an error rather than a signal.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use crate::{Digest, Result, StoreError};

/// A power of two of BLAKE3's chunks, few enough to stay in a core's cache between reading and hashing. Where the file lies in large
/// pages of memory, half as many took 6 % longer.
const PIECE_BYTES: u64 = 512 << 10;

/// Digest of a file's first `size_bytes` bytes, each read once and handed to `take` with its offset, in no particular order.
pub(crate) fn hash_file(path: &Path, file: &File, size_bytes: u64, take: impl Fn(&[u8], u64) -> Result<()> + Sync) -> Result<Digest> {
    let read = |piece: &mut [u8], offset: u64| match file.read_exact_at(piece, offset) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(StoreError::ChangedWhileRead { path: path.to_owned() }),
        other => other.map_err(StoreError::io("read", path)),
    };
    if size_bytes <= PIECE_BYTES {
        let mut content = vec![0; size_bytes as usize];
        read(&mut content, 0)?;
        take(&content, 0)?;
        return Ok(Digest::of(&content));
    }
    let pieces = size_bytes.div_ceil(PIECE_BYTES);
    let next = AtomicU64::new(0);
    let worker = || -> Result<Vec<(u64, ChainingValue)>> {
        let mut buffer = vec![0; PIECE_BYTES as usize];
        let mut hashed = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= pieces {
                return Ok(hashed);
            }
            let offset = at * PIECE_BYTES;
            let piece = &mut buffer[..PIECE_BYTES.min(size_bytes - offset) as usize];
            // After an error nobody needs the rest.
            read(piece, offset).and_then(|()| take(piece, offset)).inspect_err(|_| next.store(pieces, Ordering::Relaxed))?;
            hashed.push((at, blake3::Hasher::new().set_input_offset(offset).update(piece).finalize_non_root()));
        }
    };
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let mut hashed = thread::scope(|scope| {
        // This thread works too, so that all is done even where no other can be started.
        let others: Vec<_> = (1..cores.min(pieces)).map_while(|_| thread::Builder::new().spawn_scoped(scope, worker).ok()).collect();
        let own = worker();
        others.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).fold(own, |all, found| {
            let mut all = all?;
            all.extend(found?);
            Ok(all)
        })
    })?;
    hashed.sort_unstable_by_key(|(at, _)| *at);
    let pieces: Vec<ChainingValue> = hashed.into_iter().map(|(_, value)| value).collect();
    let (left, right) = pieces.split_at(left_pieces(pieces.len()));
    Ok(Digest::from_bytes(*merge_subtrees_root(&merge(left), &merge(right), Mode::Hash).as_bytes()))
}

/// Chaining value of a subtree that is not the root.
fn merge(pieces: &[ChainingValue]) -> ChainingValue {
    if let [piece] = pieces {
        return *piece;
    }
    let (left, right) = pieces.split_at(left_pieces(pieces.len()));
    merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
}

/// Pieces in the left subtree: the largest power of two that leaves something for the right one.
fn left_pieces(pieces: usize) -> usize {
    pieces.next_power_of_two() / 2
}

#[cfg(test)]
mod tests {
    use std::{io::Write, sync::Mutex};

    use super::{PIECE_BYTES, hash_file};
    use crate::Digest;

    #[test]
    fn it_is_blake3_at_every_shape_of_tree_and_reads_every_byte_once() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..9 * PIECE_BYTES).map(|n| (n % 251) as u8).collect();
        file.write_all(&content).unwrap();
        let sizes = (0..=9).flat_map(|pieces| [-1, 0, 1].map(|more| pieces * PIECE_BYTES as i64 + more));
        for size in sizes.filter(|size| (0..=content.len() as i64).contains(size)) {
            let size = size as usize;
            let taken = Mutex::new(Vec::new());
            let take = |bytes: &[u8], offset: u64| {
                taken.lock().unwrap().push((offset, bytes.len()));
                assert_eq!(bytes, &content[offset as usize..][..bytes.len()]);
                Ok(())
            };
            let digest = hash_file("a file".as_ref(), &file, size as u64, take).unwrap();
            assert_eq!(digest, Digest::of(&content[..size]), "{size} bytes");
            assert_eq!(taken.into_inner().unwrap().iter().map(|(_, length)| length).sum::<usize>(), size);
        }
        let short = hash_file("a file".as_ref(), &file, 100 * PIECE_BYTES, |_, _| Ok(()));
        assert!(short.unwrap_err().to_string().contains("changed while"));
    }
}
