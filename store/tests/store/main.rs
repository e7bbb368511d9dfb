//! The store from outside: what is written is read back, whatever happened in between.

mod collection;
mod crash;
mod damage;
mod environment;
mod files;
mod forks;
mod full_disk;
mod fuzz;
mod index;
mod life;
mod mounted;
mod property;
mod support;
