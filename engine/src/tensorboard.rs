//! Event files for TensorBoard: `runs/<id>/tensorboard/<stage>/events.out.tfevents.*`.
//!
//! A file is a sequence of records (length, masked CRC-32C of the length, data, masked CRC-32C of the data), each an
//! `Event` message of `tensorflow/core/util/event.proto`. Scalars and texts need a handful of its fields, written here.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use rlflow_api::StageEvent;

use crate::event::{Event, Sink};

/// Seconds between two flushes of a stage's file.
const FLUSH_SECONDS: f64 = 2.0;

/// Writes the metrics and samples of every stage that runs.
pub struct TensorBoard {
    folder: PathBuf,
    files: BTreeMap<String, EventFile>,
    failed: bool,
}

impl TensorBoard {
    /// Into `folder`, made when there is something to write.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, files: BTreeMap::new(), failed: false }
    }

    fn write(&mut self, time: f64, stage: &str, step: u64, values: &[Vec<u8>]) -> io::Result<()> {
        let file = match self.files.get_mut(stage) {
            Some(file) => file,
            None => {
                // A matrix point may be named after a path.
                let file = EventFile::create(&self.folder.join(stage.replace(['/', '\\'], "_")), time)?;
                self.files.entry(stage.to_owned()).or_insert(file)
            }
        };
        file.write(time, step, values)
    }
}

impl Sink for TensorBoard {
    fn event(&mut self, time: f64, event: &Event) {
        let done = match event {
            Event::Stage { stage, event: StageEvent::Metrics { step, values } } => {
                let values: Vec<Vec<u8>> = values.iter().map(|(name, value)| scalar(name, *value)).collect();
                self.write(time, stage, *step, &values)
            }
            Event::Stage { stage, event: StageEvent::Sample(sample) } => {
                let scores: Vec<String> = sample.scores.iter().map(|(name, value)| format!("{name} {value}")).collect();
                let shown = format!("**prompt** {}\n\n**response** {}\n\n{}", sample.prompt, sample.response, scores.join(", "));
                self.write(time, stage, sample.step, &[text("samples", &shown)])
            }
            Event::StageFinished(outcome) => match self.files.remove(&outcome.name) {
                Some(mut file) => file.out.flush(),
                None => Ok(()),
            },
            _ => Ok(()),
        };
        if let Err(error) = done
            && !std::mem::replace(&mut self.failed, true)
        {
            tracing::warn!(folder = %self.folder.display(), %error, "TensorBoard files cannot be written; the run goes on without them");
        }
    }
}

struct EventFile {
    out: BufWriter<File>,
    flushed: f64,
}

impl EventFile {
    fn create(folder: &Path, time: f64) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let name = format!("events.out.tfevents.{:010}.{host}.{}", time as u64, std::process::id());
        let mut out = BufWriter::new(File::create(folder.join(name))?);
        out.write_all(&record(&[field_double(1, time), field_bytes(3, b"brain.Event:2")].concat()))?;
        out.flush()?;
        Ok(Self { out, flushed: time })
    }

    fn write(&mut self, time: f64, step: u64, values: &[Vec<u8>]) -> io::Result<()> {
        let summary: Vec<u8> = values.iter().flat_map(|value| field_bytes(1, value)).collect();
        let event = [field_double(1, time), field_varint(2, step), field_bytes(5, &summary)].concat();
        self.out.write_all(&record(&event))?;
        if !(0.0..FLUSH_SECONDS).contains(&(time - self.flushed)) {
            self.out.flush()?;
            self.flushed = time;
        }
        Ok(())
    }
}

/// `Summary.Value` of a number.
fn scalar(tag: &str, value: f64) -> Vec<u8> {
    let mut bytes = field_bytes(1, tag.as_bytes());
    bytes.push(2 << 3 | 5);
    bytes.extend_from_slice(&(value as f32).to_le_bytes());
    bytes
}

/// `Summary.Value` of a text: a string tensor of one element, for the `text` plugin.
fn text(tag: &str, value: &str) -> Vec<u8> {
    const STRING: u64 = 7;
    let shape = field_bytes(2, &field_varint(1, 1));
    let tensor = [field_varint(1, STRING), field_bytes(2, &shape), field_bytes(8, value.as_bytes())].concat();
    let metadata = field_bytes(1, &field_bytes(1, b"text"));
    [field_bytes(1, tag.as_bytes()), field_bytes(8, &tensor), field_bytes(9, &metadata)].concat()
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn field_varint(number: u8, value: u64) -> Vec<u8> {
    let mut out = vec![number << 3];
    varint(value, &mut out);
    out
}

fn field_double(number: u8, value: f64) -> Vec<u8> {
    let mut out = vec![number << 3 | 1];
    out.extend_from_slice(&value.to_le_bytes());
    out
}

fn field_bytes(number: u8, value: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    varint(value.len() as u64, &mut out);
    out.extend_from_slice(value);
    out
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length).to_le_bytes(), data, &masked_crc(data).to_le_bytes()].concat()
}

/// The checksum of TFRecord files: rotated and shifted, so that a checksum over checksums means something.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: records are short.
fn crc32c(data: &[u8]) -> u32 {
    !data
        .iter()
        .fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc32c() {
        // The check value of CRC-32C in the catalogue of parametrised CRC algorithms.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_scalar_is_encoded_as_tensorflow_encodes_it() {
        // tf.compat.v1.Summary.Value(tag="loss", simple_value=0.5).SerializeToString()
        assert_eq!(scalar("loss", 0.5), b"\x0a\x04loss\x15\x00\x00\x00\x3f");
        assert_eq!(field_varint(2, 300), [0x10, 0xac, 0x02]);
    }

    #[test]
    fn every_record_carries_its_length_and_checksums() {
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::new(folder.path().join("tensorboard"));
        for step in 1..=3 {
            let event = StageEvent::Metrics { step, values: vec![("loss".into(), 1.0 / step as f64), ("lr".into(), 0.1)] };
            board.event(step as f64, &Event::Stage { stage: "sft".into(), event });
        }
        drop(board);
        let files: Vec<_> = fs::read_dir(folder.path().join("tensorboard/sft")).unwrap().collect();
        assert_eq!(files.len(), 1);
        let content = fs::read(files[0].as_ref().unwrap().path()).unwrap();
        let (mut rest, mut records) = (&content[..], 0);
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[..12 + length + 4], record(&rest[12..12 + length]));
            rest = &rest[12 + length + 4..];
            records += 1;
        }
        assert_eq!(records, 4);
    }
}
