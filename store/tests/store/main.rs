//! The store from outside: what is written is read back, whatever happened in between.

mod life;
mod support;
