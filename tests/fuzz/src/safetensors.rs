//! The header of a safetensors file, as the crate `safetensors` reads it for the import of checkpoints: what it accepts, every reader of
//! tensors relies on.

use safetensors::SafeTensors;

/// Fails on a panic.
pub fn check(input: &[u8]) {
    let Ok((header_bytes, header)) = SafeTensors::read_metadata(input) else { return };
    assert!(header_bytes <= input.len());
    drop(header.tensors());
    let Ok(tensors) = SafeTensors::deserialize(input) else { return };
    for (name, tensor) in tensors.tensors() {
        let elements: usize = tensor.shape().iter().product();
        assert_eq!(tensor.data().len() * 8, elements * tensor.dtype().bitsize(), "{name}");
    }
}
