//! Stage kinds of rlflow: data, trainers, PPO, DPO, evaluation.
