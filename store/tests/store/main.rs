//! The store from outside: what is written is read back, whatever happened in between.

mod collection;
mod crash;
mod environment;
mod index;
mod life;
mod property;
mod support;
