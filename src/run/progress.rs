//! What a person sees while cells run: one live line on a terminal, one line per finished cell.

use crate::output::note;
use crate::record::{CellRecord, Outcome};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;

pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
}

impl Progress {
    /// Writes to standard error, so that standard output stays for results.
    pub fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::no_length() } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{spinner} [{pos}/{len}] {prefix}  {msg} ({elapsed})")
        {
            bar.set_style(style);
        }
        Self { bar, terminal }
    }

    /// Shows nothing.
    pub fn hidden() -> Self {
        Self { bar: ProgressBar::hidden(), terminal: true }
    }

    pub fn begin(&self, index: usize, total: usize, cell: &str) {
        self.bar.set_length(total as u64);
        self.bar.set_position(index as u64);
        self.bar.set_prefix(cell.to_owned());
        self.bar.set_message("starting");
        self.bar.reset_elapsed();
        self.bar.enable_steady_tick(Duration::from_millis(200));
    }

    pub fn doing(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    pub fn end(&self, record: &CellRecord) {
        self.say(&line(record));
    }

    /// A line that stays, above the live one.
    pub fn say(&self, line: &str) {
        if self.terminal {
            self.bar.println(line);
        } else {
            note(line);
        }
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

fn line(record: &CellRecord) -> String {
    let mut parts = vec![format!("{:>7.1} s", record.wall_seconds)];
    if let Some(bytes) = record.peak_memory_bytes {
        parts.push(format!("peak {:.2} GB", bytes as f64 / 1e9));
    }
    if let Some(rate) = record.tokens_per_second {
        parts.push(format!("{rate:.1} tokens/s"));
    }
    if !record.samples.disturbances.is_empty() {
        parts.push(format!("disturbed: {}", record.samples.disturbances.join(", ")));
    }
    if record.samples.steady == Some(false) {
        parts.push("not steady".to_owned());
    }
    if let Some(error) = &record.error {
        parts.push(format!("during {}: {}", error.during, error.message));
    }
    let mark = if record.outcome == Outcome::Ok { "ok" } else { record.outcome.as_str() };
    format!("{mark:<11} {:<56} {}", record.cell, parts.join(", "))
}
