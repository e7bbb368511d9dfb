//! Hugging Face checkpoint directories, without a tensor of Burn in sight.
//!
//! In data order: [`WeightFiles`] finds the files that hold weights (and refuses pickles), [`config`] reads
//! `config.json` as a [`rlflow_api::ModelConfig`] and writes one, [`names`] is the table between names and layouts in files and those
//! of rlflow, [`safetensors`] reads and writes headers, [`Checkpoint`] streams tensors out of files and [`Writer`] into them; [`peft`] is the
//! format of adapters.
//!
//! Nothing here trusts a file: lengths, offsets, shapes and names are checked before they are used, and every error names
//! the file and what is wrong in it.

mod checkpoint;
pub mod config;
mod error;
pub mod names;
pub mod peft;
pub mod safetensors;
mod weight_files;
mod writer;

pub use checkpoint::{Checkpoint, Piece, WeightFile};
pub use config::{HfConfig, Role};
pub use error::HfError;
pub use names::{FileTensor, WantedTensor};
pub use weight_files::{WeightFiles, is_pickle, lone_adapter, pickled};
pub use writer::{Writer, converted};
