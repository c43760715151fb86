//! What people read: the report in Markdown and as a page, with its charts, and the summary in the terminal.
//! Everything comes from the record, so that the same record gives the same bytes on any machine.

mod beside;
mod change;
pub mod charts;
mod doubts;
mod drawings;
mod facts;
pub mod format;
pub mod hosts;
mod limits;
pub mod page;
pub mod png;
mod pools;
mod prose;
mod quality;
pub mod report;
pub mod sections;
mod stock;
pub mod tables;
pub mod terminal;
mod trace;
mod troubles;
mod tuning;
mod unsettled;
