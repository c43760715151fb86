//! From a record to a decision and to the report that people read.

mod decision;
mod records;
mod rendering;
