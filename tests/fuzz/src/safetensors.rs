//! The header of a safetensors file: what it accepts, the import of checkpoints relies on.

use rlflow_hf::safetensors::Header;

/// Fails on a panic, and where tensors do not fill the file or a header does not read back.
pub fn check(input: &[u8]) {
    let Ok((header, raw)) = Header::read(&mut &input[..], input.len() as u64, "fuzz") else { return };
    assert_eq!(header.size_bytes, raw.len() as u64);
    let mut at = header.size_bytes;
    for tensor in &header.tensors {
        assert_eq!(header.size_bytes + tensor.start, at, "{}", tensor.name);
        at += tensor.size_bytes;
    }
    assert_eq!(at, input.len() as u64, "tensors fill the file");
    let again = Header::encode(&header.tensors);
    let file_bytes = again.len() as u64 + at - header.size_bytes;
    let (read, _) = Header::read(&mut again.as_slice(), file_bytes, "fuzz").expect("what is written can be read");
    assert_eq!(read.tensors, header.tensors);
}
