//! From a record to a decision: knock-outs, dominance, anchored scores, a weighted total with what is
//! unknown kept unknown, and a verdict that may be that there is none.

pub mod breakeven;
pub mod criteria;
pub mod fallback;
pub mod figures;
pub mod jobs;
pub mod knockout;
pub mod metric;
pub mod ranking;
pub mod score;
pub mod smaa;
pub mod value;
pub mod work;

use crate::record::CellRecord;
use criteria::Criteria;
use fallback::TargetVerdict;
use jobs::{Job, arrange, compared, is_beside_tuned, is_software_adapter, models};
use ranking::Ranking;
use serde::Serialize;

/// The decision of a run: one ranking for each model, because engines that were measured on different
/// models cannot be compared.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Decision {
    pub memory_target_bytes: u64,
    /// The largest model with an engine to choose first.
    pub rankings: Vec<Ranking>,
    /// Of each hardware that the decision is for.
    pub targets: Vec<TargetVerdict>,
    /// Engines whose device renders on the CPU. They are in no ranking.
    pub software_adapters: Vec<String>,
    /// Stock forms of engines that ran as well. A framework is ranked by the best that it was made to do, and the
    /// stock form, which may have run less, is in no ranking.
    pub stock_forms: Vec<String>,
}

impl Decision {
    /// The ranking that the report leads with; `None` if the record holds software adapters only.
    pub fn headline(&self) -> Option<&Ranking> {
        self.rankings.first()
    }

    pub fn is_software(&self, engine: &str) -> bool {
        self.software_adapters.iter().any(|name| name == engine)
    }
}

pub fn decide(cells: &[CellRecord], criteria: &Criteria) -> Decision {
    let all = compared(&arrange(cells));
    let mut engines: Vec<&str> = all.iter().map(|j| j.engine).collect();
    engines.sort_unstable();
    engines.dedup();
    let (software, hardware): (Vec<&str>, Vec<&str>) =
        engines.into_iter().partition(|engine| is_software_adapter(cells, engine));
    let (stock, ranked): (Vec<&str>, Vec<&str>) =
        hardware.into_iter().partition(|engine| is_beside_tuned(cells, engine));
    let jobs: Vec<Job> = all.into_iter().filter(|j| ranked.contains(&j.engine)).collect();

    let mut rankings: Vec<Ranking> =
        models(&jobs).iter().rev().map(|model| Ranking::of(&jobs, model, criteria)).collect();
    // Stable: the largest stays first among those with something to choose.
    rankings.sort_by_key(|r| r.candidates.is_empty());
    let names = |engines: Vec<&str>| engines.into_iter().map(str::to_owned).collect();
    Decision {
        targets: fallback::verdicts(cells, rankings.first(), &criteria.targets),
        memory_target_bytes: criteria.memory_target_bytes(),
        rankings,
        software_adapters: names(software),
        stock_forms: names(stock),
    }
}
