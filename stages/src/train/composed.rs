//! What operations hold that are composed of plain tensor operations (`rlflow_model::composed`), as they are on GPUs: whatever their
//! backward pass reads, attention's scores of the whole micro-batch among it, and no packed weights. Counted from what Burn's
//! autodiff keeps; not yet compared with a GPU.

use rlflow_api::{ModelConfig, Positions};

use super::{
    Precision,
    needs::{Half, Pass},
};

/// More than any device has. What is reckoned with from here on stays in range.
fn elements(count: u128) -> u64 {
    const MOST: u128 = 1 << 44;
    count.min(MOST) as u64
}

/// Elements of a token that a norm keeps: before its weight and after it; in bfloat16 each of its readers keeps a rounded copy.
fn of_norm(model: &ModelConfig, pass: Pass, readers: u128) -> u128 {
    let centred = u128::from(model.style.layer_norm);
    model.hidden_size as u128 * (1 + if pass.precision == Precision::Bf16 { readers } else { 1 } + centred)
}

/// Weights that products round keep a copy of them in f32.
fn rounded(pass: Pass, weights: u128) -> u128 {
    if pass.precision == Precision::Bf16 { weights } else { 0 }
}

/// The attention half of a block. With `has_dropout` every projection has an adapter that drops some of what it sees.
pub(super) fn attention(model: &ModelConfig, pass: Pass, has_dropout: bool) -> Half {
    let (tokens, hidden) = (u128::from(pass.tokens), model.hidden_size as u128);
    let (query, kv) = ((model.heads * model.head_dim) as u128, (model.kv_heads * model.head_dim) as u128);
    let scores = (model.heads as u128 * tokens).saturating_mul(tokens).min(1 << 100);
    // A byte for each.
    let mask = scores / 4;
    let bias = if model.positions == Positions::Alibi { scores } else { 0 };
    let head_norms = if model.style.qk_norm { 2 * (query + kv) } else { 0 };
    // Factors, and what is left.
    let dropped = if has_dropout { 2 * (3 * hidden + query) } else { 0 };
    // The result; queries, keys and values as every head has them, and their weighted sums.
    let rows = hidden + of_norm(model, pass, 3) + head_norms + 4 * query + dropped;
    let passing = tokens * (2 * hidden + 4 * query);
    Half {
        // Exponentials, probabilities and the mask.
        kept: elements(tokens * rows + 2 * scores + mask + rounded(pass, 2 * hidden * (query + kv))),
        forward: elements(passing + 3 * scores + mask + bias + rounded(pass, hidden * query)),
        backward: elements(passing + 4 * scores),
    }
}

/// The feed-forward half, likewise.
pub(super) fn mlp(model: &ModelConfig, pass: Pass, has_dropout: bool) -> Half {
    let (tokens, hidden, inner) = (u128::from(pass.tokens), model.hidden_size as u128, model.intermediate_size as u128);
    // Of a gated layer the gate, its sigmoid, their product, what it lets through, and the product of both; of a plain one what is
    // activated, its square and its half, tanh and that plus one, and the product.
    let (readers, activated) = if model.style.plain_mlp { (1, 6) } else { (2, 5) };
    let dropped = if has_dropout { 2 * (readers * hidden + inner) } else { 0 };
    let rows = hidden + of_norm(model, pass, readers) + activated * inner + dropped;
    let passing = tokens * (2 * hidden + 4 * inner);
    Half {
        kept: elements(tokens * rows + rounded(pass, (readers + 1) * hidden * inner)),
        forward: elements(passing + rounded(pass, hidden * inner)),
        backward: elements(passing),
    }
}

/// The token head, beside the rows that it reads: logits of all tokens, of the whole vocabulary.
pub(super) fn logits(model: &ModelConfig, pass: Pass, is_recorded: bool) -> u64 {
    let (tokens, hidden, vocab) = (u128::from(pass.tokens), model.hidden_size as u128, model.vocab_size as u128);
    // Logits, log-probabilities, probabilities and a product; of a recorded pass exponentials, log-probabilities and probabilities stay
    // while four gradients come and go.
    let copies = if is_recorded { 7 } else { 4 };
    elements(copies * tokens * vocab + rounded(pass, hidden * (vocab + tokens)))
}

#[cfg(test)]
mod tests {
    use rlflow_api::{Architecture, BlockStyle};
    use rlflow_model::Head;

    use super::*;

    fn model() -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 11,
            hidden_size: 8,
            intermediate_size: 12,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            context: 8,
            positions: Positions::Rope,
            rope_theta: 10_000.0,
            rope_scaling: None,
            norm_eps: 1e-5,
            tie_embeddings: true,
            style: BlockStyle::default(),
        }
    }

    fn pass(tokens: u64, precision: Precision) -> Pass {
        Pass { head: Head::Language, tokens, micro_batches: 1, checkpointing: false, precision }
    }

    /// Worked by hand: four tokens have 2 * 4 * 4 scores, and keep 8 + 2 * 8 + 4 * 8 numbers each in attention, 8 + 2 * 8 + 5 * 12 in
    /// the feed-forward layer.
    #[test]
    fn halves_keep_what_their_backward_pass_reads() {
        let (model, four) = (model(), pass(4, Precision::Fp32));
        let expected = Half { kept: 4 * 56 + 2 * 32 + 8, forward: 4 * 48 + 3 * 32 + 8, backward: 4 * 48 + 4 * 32 };
        assert_eq!(attention(&model, four, false), expected);
        assert_eq!(mlp(&model, four, false), Half { kept: 4 * 84, forward: 4 * 64, backward: 4 * 64 });
        assert_eq!([true, false].map(|is_recorded| logits(&model, four, is_recorded)), [7 * 44, 4 * 44]);
        // Rounded are rows for three and two projections, and 2 * 8 * (8 + 4) and 3 * 8 * 12 weights.
        let half = pass(4, Precision::Bf16);
        assert_eq!(attention(&model, half, false).kept, expected.kept + 4 * 16 + 192);
        assert_eq!(mlp(&model, half, false).kept, 4 * 84 + 4 * 8 + 288);
        // Dropout doubles what four and three projections see.
        assert_eq!(attention(&model, four, true).kept, expected.kept + 4 * 2 * (3 * 8 + 8));
        assert_eq!(mlp(&model, four, true).kept, 4 * 84 + 4 * 2 * (2 * 8 + 12));
    }

    #[test]
    fn scores_grow_with_the_square_and_no_size_overflows() {
        let attention = |tokens: u64| attention(&model(), pass(tokens, Precision::Fp32), false);
        let ratio = attention(200_000).kept as f64 / attention(100_000).kept as f64;
        assert!((ratio - 4.0).abs() < 1e-2, "{ratio}");
        assert_eq!(attention(u64::MAX).kept, 1 << 44);
    }
}
