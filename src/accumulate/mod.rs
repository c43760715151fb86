//! Records of several machines and of several days, put together.

pub mod history;
pub mod merge;
