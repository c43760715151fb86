//! From a record to a decision and to the report that people read.

mod decision;
mod device;
mod page;
mod records;
mod rendering;
