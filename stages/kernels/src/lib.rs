//! CPU kernels of rlflow: forward and backward of the fused operations on plain slices.
