//! Text side of rlflow's stages: readers, mixtures, tokenizers, chat templates, datasets.
