//! Speed of matrix products in the shapes that training meets: `cargo run --release --example gemm_shapes`.

use std::time::Instant;

use rlflow_kernels::{
    bf16::{self, Unit},
    matmul::{Into, MatrixRef, matmul},
};

fn main() {
    println!("{:>22} {:>10} {:>10} {:>10}", "tokens x in x out", "forward", "d input", "d weight");
    for (tokens, input, output) in [
        (1024, 128, 128),
        (1024, 128, 384),
        (1024, 384, 128),
        (1024, 128, 1024),
        (4096, 128, 384),
        (2048, 256, 768),
        (2048, 512, 1408),
        (2048, 512, 512),
    ] {
        let x = vec![0.5f32; tokens * input];
        let w = vec![0.25f32; input * output];
        let y = vec![0.125f32; tokens * output];
        let flops = 2.0 * (tokens * input * output) as f64;
        let (x, w, y) = (MatrixRef::new(&x, tokens, input), MatrixRef::new(&w, output, input), MatrixRef::new(&y, tokens, output));
        let shape = format!("{tokens} x {input} x {output}");
        let line = |name: &str, multiply: &dyn Fn(&mut [f32], MatrixRef<'_>, MatrixRef<'_>)| {
            let forward = rate(flops, tokens * output, |out| multiply(out, x, w.t()));
            let input_gradient = rate(flops, tokens * input, |out| multiply(out, y, w));
            let weight_gradient = rate(flops, input * output, |out| multiply(out, y.t(), x));
            println!("{shape:>22} {forward:>10.0} {input_gradient:>10.0} {weight_gradient:>10.0}  {name}");
        };
        line("f32", &|out, a, b| matmul(out, a, b));
        for unit in Unit::available().into_iter().filter(|unit| *unit != Unit::Rounded) {
            line(unit.name(), &|out, a, b| bf16::multiply(unit, out, b.columns(), a, b, 1.0, Into::Overwrite, true));
        }
    }
    println!("GFLOP/s, median of 15, {} threads", rayon::current_num_threads());
}

fn rate(flops: f64, len: usize, mut run: impl FnMut(&mut [f32])) -> f64 {
    let mut out = vec![0.0; len];
    let mut seconds: Vec<f64> = (0..15)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..10 {
                run(&mut out);
            }
            start.elapsed().as_secs_f64() / 10.0
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    flops / seconds[7] / 1e9
}
