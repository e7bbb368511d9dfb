//! How settings are marked in a config's JSON Schema.
//!
//! | mark | meaning |
//! |---|---|
//! | none | identity: part of the action key |
//! | `#[schemars(extend("x-setting" = "execution"))]` | says where or how fast, never what: not in the key |
//! | `#[schemars(extend("x-setting" = "path"))]` | names data files: their digests are in the key instead |
//! | `#[schemars(extend("x-unit" = "tokens"))]` | unit, for the documentation |
//!
//! A mark on an object applies to everything in it.

/// The schema keyword that carries the mark.
pub const MARK: &str = "x-setting";
/// Mark of a setting that never enters a key.
pub const EXECUTION: &str = "execution";
/// Mark of a setting that names data files.
pub const PATH: &str = "path";
/// The schema keyword for units.
pub const UNIT: &str = "x-unit";
