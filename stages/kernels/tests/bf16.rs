//! Products of rounded numbers: every unit of the processor against float64, on ragged shapes and all layouts.

use proptest::prelude::*;
use rlflow_kernels::{
    bf16::{self, Unit},
    matmul::{Into, MatrixRef},
};

/// Values from a small generator: no two tests share a stream, and none needs a seed from outside.
fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let draw = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..len).map(draw).collect()
}

/// A matrix stored by rows or, transposed, by columns.
struct Stored {
    data: Vec<f32>,
    rows: usize,
    columns: usize,
    is_transposed: bool,
}

impl Stored {
    fn new(rows: usize, columns: usize, is_transposed: bool, seed: u64) -> Self {
        Self { data: values(rows * columns, seed), rows, columns, is_transposed }
    }

    fn view(&self) -> MatrixRef<'_> {
        if self.is_transposed {
            MatrixRef::new(&self.data, self.columns, self.rows).t()
        } else {
            MatrixRef::new(&self.data, self.rows, self.columns)
        }
    }
}

fn product(unit: Unit, a: &Stored, b: &Stored, parallel: bool) -> Vec<f32> {
    let mut out = vec![f32::NAN; a.rows * b.columns];
    bf16::multiply(unit, &mut out, b.columns, a.view(), b.view(), 1.0, Into::Overwrite, parallel);
    out
}

/// In float64, which is exact for the products and all but exact for their sum.
fn expected(a: &Stored, b: &Stored) -> Vec<f64> {
    let at = |matrix: &Stored, row, column| f64::from(bf16::widen(bf16::round(matrix.view().get(row, column))));
    let cells = (0..a.rows).flat_map(|row| (0..b.columns).map(move |column| (row, column)));
    cells.map(|(row, column)| (0..a.columns).map(|inner| at(a, row, inner) * at(b, inner, column)).sum()).collect()
}

#[test]
fn numbers_round_to_nearest_and_ties_to_even() {
    // By hand: bfloat16 has 7 bits behind the point, so that at 1 its step is 1/128 and half a step 1/256.
    for (value, rounded) in [
        (1.0, 1.0),
        (1.0 + 1.0 / 256.0, 1.0),
        (1.0 + 3.0 / 256.0, 1.0 + 2.0 / 128.0),
        (1.0 + 1.1 / 256.0, 1.0 + 1.0 / 128.0),
        (-1.0 - 1.1 / 256.0, -1.0 - 1.0 / 128.0),
        (f32::MAX, f32::INFINITY),
        (f32::NEG_INFINITY, f32::NEG_INFINITY),
        (0.0, 0.0),
    ] {
        assert_eq!(bf16::widen(bf16::round(value)), rounded, "{value}");
    }
    assert!(bf16::widen(bf16::round(f32::NAN)).is_nan());
    assert!(bf16::widen(bf16::round(f32::from_bits(0x7f80_0001))).is_nan(), "a NaN whose upper half is that of infinity");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_unit_gives_the_sums_of_float64(
        m in 1_usize..150, n in 1_usize..90, k in 1_usize..140, a_transposed: bool, b_transposed: bool, seed: u64,
    ) {
        let (a, b) = (Stored::new(m, k, a_transposed, seed), Stored::new(k, n, b_transposed, seed ^ 1));
        let expected = expected(&a, &b);
        for unit in Unit::available() {
            let out = product(unit, &a, &b, true);
            for (actual, expected) in out.iter().zip(&expected) {
                prop_assert!((f64::from(*actual) - expected).abs() < 2e-5, "{unit:?}: {actual} against {expected}");
            }
            prop_assert_eq!(&out, &product(unit, &a, &b, false), "{:?}: threads change bits", unit);
        }
    }
}

/// A row alone, and among others, gives the same bits; so does a result that is added to.
#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let (a, b) = (Stored::new(100, 70, false, 3), Stored::new(70, 50, false, 4));
    for unit in Unit::available() {
        if unit == Unit::Rounded {
            continue;
        }
        let all = product(unit, &a, &b, true);
        for row in [0, 31, 32, 99] {
            let alone = Stored { data: a.data[row * 70..(row + 1) * 70].to_vec(), rows: 1, columns: 70, is_transposed: false };
            assert_eq!(product(unit, &alone, &b, false), all[row * 50..(row + 1) * 50], "{unit:?}, row {row}");
        }
        let mut added = vec![1.0; 100 * 60];
        bf16::multiply(unit, &mut added, 60, a.view(), b.view(), 0.5, Into::Add, true);
        for (row, sums) in added.chunks(60).enumerate() {
            for column in 0..50 {
                assert_eq!(sums[column], 1.0 + all[row * 50 + column] * 0.5);
            }
            assert_eq!(sums[50..], [1.0; 10], "what lies between rows stays");
        }
    }
}
