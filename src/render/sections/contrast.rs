//! In what two candidates differ, quantity by quantity and probe by probe.

use crate::decide::criteria::{Criteria, Source};
use crate::decide::ranking::Candidate;
use crate::decide::score::{Basis, PartScore, RESOLUTION, Score};
use crate::render::format::{markdown, points, significant};
use serde::Serialize;

/// One of two is better in something that was measured of both.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    pub is_better: bool,
    /// In words, safe for Markdown, with both figures.
    pub text: String,
    /// Points of the total that it makes, with the weights as stated.
    pub points: f64,
    /// The cells that show it.
    pub cells: Vec<String>,
}

/// From the largest to the smallest.
pub fn differences(own: &Candidate, other: &Candidate, criteria: &Criteria) -> Vec<Difference> {
    let mut found = Vec::new();
    for ((criterion, a), b) in criteria.criteria.iter().zip(&own.scores).zip(&other.scores) {
        let (Score::Measured { basis: a, .. }, Score::Measured { basis: b, .. }) = (a, b) else { continue };
        match (&criterion.source, a, b) {
            (Source::Metrics { .. }, Basis::Metrics { parts: a }, Basis::Metrics { parts: b }) => {
                let pairs = a.iter().zip(b);
                found.extend(pairs.filter_map(|(a, b)| of_part(a, b, &other.engine, criterion.weight)));
            }
            (Source::Checklist { checks }, Basis::Checklist { .. }, Basis::Checklist { .. }) => {
                let worth = criterion.weight / 10.0 / checks.len() as f64;
                found.extend(of_checks(a, b, &other.engine, worth));
            }
            (_, Basis::Judgement(a), Basis::Judgement(b)) if (a.score - b.score).abs() >= RESOLUTION => {
                found.push(Difference {
                    is_better: a.score > b.score,
                    text: format!(
                        "{}: judged {} against {} of {}",
                        markdown(&criterion.title),
                        points(a.score),
                        points(b.score),
                        markdown(&other.engine)
                    ),
                    points: (a.score - b.score).abs() * criterion.weight / 100.0,
                    cells: Vec::new(),
                });
            }
            _ => {}
        }
    }
    found.sort_by(|a, b| b.points.total_cmp(&a.points));
    found
}

/// `None` where both score alike.
fn of_part(own: &PartScore, other: &PartScore, engine: &str, weight: f64) -> Option<Difference> {
    let (a, b) = (own.score?, other.score?);
    let (own_figure, other_figure) = (own.measured.as_ref()?, other.measured.as_ref()?);
    let cells = own_figure.cells.iter().chain(&other_figure.cells).cloned().collect();
    ((a - b).abs() >= RESOLUTION).then(|| Difference {
        is_better: a > b,
        text: format!(
            "{}: {} against {} of {}",
            markdown(own.title),
            significant(own_figure.value),
            significant(other_figure.value),
            markdown(engine)
        ),
        points: (a - b).abs() * own.weight / 100.0 * weight / 100.0,
        cells,
    })
}

/// Probes that one passed and the other failed. `worth` is what an item adds to the total.
fn of_checks(own: &Basis, other: &Basis, engine: &str, worth: f64) -> Vec<Difference> {
    let (
        Basis::Checklist { passed, failed, .. },
        Basis::Checklist { passed: theirs, failed: not_theirs, .. },
    ) = (own, other)
    else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for check in passed {
        if let Some(failure) = not_theirs.iter().find(|c| c.probe == check.probe) {
            let text = format!("{}: {} failed it", markdown(&check.title), markdown(engine));
            let cells = vec![check.cell.clone(), failure.cell.clone()];
            found.push(Difference { is_better: true, text, points: worth, cells });
        }
    }
    for check in failed {
        if let Some(success) = theirs.iter().find(|c| c.probe == check.probe) {
            let text = format!("{}: it failed this, {} did not", markdown(&check.title), markdown(engine));
            let cells = vec![check.cell.clone(), success.cell.clone()];
            found.push(Difference { is_better: false, text, points: worth, cells });
        }
    }
    found
}
