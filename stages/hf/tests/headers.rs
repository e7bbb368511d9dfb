//! Headers of safetensors files: what is written reads back, and no damage gets through or panics.

use proptest::prelude::*;
use rlflow_hf::{
    WeightFiles, converted,
    safetensors::{Header, TensorInfo},
};
use rlflow_store::Dtype;

fn read(content: &[u8]) -> Result<Header, rlflow_hf::HfError> {
    Header::read(&mut &content[..], content.len() as u64, "file").map(|(header, _)| header)
}

fn file(header: &str, data_bytes: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data_bytes]].concat()
}

proptest! {
    #[test]
    fn what_is_written_reads_back(shapes in prop::collection::btree_map(".{1,8}", prop::collection::vec(0u64..5, 0..4), 0..8)) {
        let mut start = 0;
        let tensors: Vec<TensorInfo> = shapes
            .into_iter()
            .filter(|(name, _)| name != "__metadata__")
            .map(|(name, shape)| {
                let size_bytes = 2 * shape.iter().product::<u64>();
                start += size_bytes;
                TensorInfo { name, dtype: "BF16".into(), shape, start: start - size_bytes, size_bytes }
            })
            .collect();
        let mut content = Header::encode(&tensors);
        prop_assert_eq!(content.len() % 8, 0);
        content.resize(content.len() + start as usize, 7);
        let mut expected = tensors;
        // Tensors without elements share their place with their neighbours; they come first then.
        expected.sort_by(|a, b| (a.start, a.size_bytes, &a.name).cmp(&(b.start, b.size_bytes, &b.name)));
        prop_assert_eq!(read(&content).unwrap().tensors, expected);
    }

    #[test]
    fn damage_is_an_error_or_another_header(position in 0usize..150, byte in any::<u8>(), length in 0usize..170) {
        let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"F16","shape":[2],"data_offsets":[8,12]}}"#;
        let mut content = file(header, 12);
        content[position] = byte;
        content.truncate(length);
        if let Ok(header) = read(&content) {
            let bytes: u64 = header.tensors.iter().map(|tensor| tensor.size_bytes).sum();
            prop_assert_eq!(header.size_bytes + bytes, content.len() as u64);
        }
    }
}

#[test]
fn lies_are_told_by_name() {
    let wrong = |header: &str, data_bytes: usize, expected: &str| {
        let error = read(&file(header, data_bytes)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let tensor = |name: &str, shape: &str, offsets: &str| format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#);
    let of = |tensors: &[String]| format!("{{{}}}", tensors.join(","));
    wrong(&of(&[tensor("a", "[2]", "[0,8]"), tensor("a", "[2]", "[0,8]")]), 8, "names tensor `a` twice");
    wrong(&of(&[tensor("a", "[2]", "[0,4]")]), 4, "tensor `a` is said to be F32 of shape [2], but to take bytes 0 to 4");
    wrong(&of(&[tensor("a", "[2]", "[8,0]")]), 8, "tensor `a` is said to be");
    wrong(&of(&[tensor("a", "[4294967296,4294967296]", "[0,8]")]), 8, "tensor `a` is said to be");
    wrong(&of(&[tensor("a", "[2]", "[0,8]"), tensor("b", "[2]", "[4,12]")]), 12, "overlaps with the tensor before tensor `b`");
    wrong(&of(&[tensor("a", "[2]", "[0,8]"), tensor("b", "[2]", "[12,20]")]), 20, "leaves a hole before tensor `b`");
    wrong(&of(&[tensor("a", "[2]", "[0,8]"), tensor("b", "[2]", "[8,16]")]), 12, "ends within tensor `b`");
    wrong(&of(&[tensor("a", "[2]", "[0,8]")]), 9, "1 bytes follow its last tensor");
    wrong(r#"{"a":{"dtype":"F99","shape":[],"data_offsets":[0,4]}}"#, 4, "type `F99`, which is unknown");
    wrong("[1]", 0, "its header is not valid");
    assert!(read(&[1, 2]).unwrap_err().to_string().contains("too few for a safetensors file"));
    assert!(read(&1000u64.to_le_bytes()).unwrap_err().to_string().contains("its header has 1000 bytes"));
    assert!(read(b"PK\x03\x04....zip").unwrap_err().to_string().contains("not a safetensors file"));
}

#[test]
fn an_index_does_not_lead_out_of_its_directory() {
    let names = ["model.safetensors.index.json".to_owned(), "a.safetensors".to_owned()];
    let find = |index: &str| WeightFiles::find(&names, "dir", |_| Ok::<_, rlflow_hf::HfError>(index.as_bytes().to_vec()));
    assert_eq!(find(r#"{"weight_map":{"x":"a.safetensors"}}"#).unwrap().files, ["a.safetensors"]);
    let error = find(r#"{"weight_map":{"x":"../../etc/passwd"}}"#).unwrap_err().to_string();
    assert!(error.contains("names `../../etc/passwd`, which the directory does not hold"), "{error}");
    assert!(find(r#"{"weight_map":{}}"#).is_err() && find("{").is_err());
}

/// Rounding to nearest, ties to even: 1 + 2^-8 lies between two bf16 numbers, 1 + 3 * 2^-8 too.
#[test]
fn conversions_round_to_nearest_even() {
    let bytes: Vec<u8> =
        [1.0f32 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8), -0.0, f32::INFINITY].into_iter().flat_map(f32::to_le_bytes).collect();
    let half = converted(bytes, Dtype::F32, Dtype::Bf16);
    assert_eq!(half, [0x80, 0x3F, 0x82, 0x3F, 0x00, 0x80, 0x80, 0x7F]);
    let wide = converted(half.clone(), Dtype::Bf16, Dtype::F32);
    assert_eq!(converted(wide, Dtype::F32, Dtype::Bf16), half);
}
