//! `evalfw score`, through the binary, on scorecards with known mistakes.

use assert_cmd::Command;
use evalfw::scorecard::{Checked, Kind, check, parse_markdown, parse_toml};
use proptest::prelude::*;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/fixtures/scorecards", name].iter().collect()
}

fn score(path: &Path) -> Command {
    let mut command = Command::cargo_bin("evalfw").unwrap();
    command.arg("score").arg(path);
    command
}

/// The exit code and what was printed as JSON.
fn json(path: &Path) -> (i32, Value) {
    let output = score(path).arg("--json").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let value = serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{e}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code().unwrap(), value)
}

fn findings(value: &Value) -> Vec<(u64, &str, &str)> {
    let all = value["findings"].as_array().unwrap().iter();
    all.map(|f| (f["line"].as_u64().unwrap(), f["kind"].as_str().unwrap(), f["text"].as_str().unwrap()))
        .collect()
}

/// What bad input is answered with, exit code 2.
fn refusal(name: &str, text: &str, arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    let output = score(&path).args(arguments).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    message
}

fn markdown(text: &str) -> Checked {
    check(&parse_markdown(text, None, None).unwrap())
}

fn toml(text: &str) -> Checked {
    check(&parse_toml(text, None).unwrap())
}

fn kinds(checked: &Checked) -> Vec<Kind> {
    checked.findings.iter().map(|f| f.kind).collect()
}

/// The only finding, which must be of this kind.
fn only(checked: &Checked, kind: Kind) -> String {
    assert_eq!(kinds(checked), [kind], "{:?}", checked.findings);
    checked.findings[0].text.clone()
}

/// Two criteria of equal weight and two options, with something in it to be replaced.
const EVEN: &str = "\
[weights]
speed = 50
memory = 50
[options.A]
scores = { speed = 9, memory = 8 }
[options.B]
scores = { speed = 6, memory = 7 }
";

const SLIPS: [(&str, &str); 3] = [
    (
        "total",
        "A: the total is stated as 8.6, but 25 % · 9 + 25 % · 9 + 20 % · 8 + 20 % · 9 + 10 % · 8 is 8.70",
    ),
    (
        "total",
        "B: the total is stated as 6.4, but 25 % · 4 + 25 % · 6 + 20 % · 6 + 20 % · 9 + 10 % · 10 is 6.50",
    ),
    ("decision", "B is stated as the winner, but A has a higher total: 8.70 against 6.50"),
];

#[test]
fn totals_that_do_not_add_up_and_a_decision_for_the_lower_are_found_in_markdown() {
    let (code, value) = json(&fixture("hearsay.md"));
    assert_eq!(code, 1);
    let expected: Vec<_> =
        [10, 10, 12].into_iter().zip(SLIPS).map(|(line, (kind, text))| (line, kind, text)).collect();
    assert_eq!(findings(&value), expected);
    assert_eq!(value["winners"], serde_json::json!(["A"]));
}

#[test]
fn and_in_toml() {
    let (code, value) = json(&fixture("hearsay.toml"));
    assert_eq!(code, 1);
    let mut expected: Vec<_> =
        [11, 20, 1].into_iter().zip(SLIPS).map(|(line, (k, text))| (line, k, text)).collect();
    expected.sort();
    assert_eq!(findings(&value), expected);
}

#[test]
fn the_table_shows_what_was_recomputed_and_each_finding_its_line() {
    let output = score(&fixture("hearsay.md")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    let row =
        |label: &str| text.lines().find(|l| l.contains(label)).unwrap_or_else(|| panic!("{label}: {text}"));
    assert!(row("total, recomputed").contains("8.70") && row("total, recomputed").contains("6.50"), "{text}");
    assert!(row("total, as stated").contains("8.6") && row("total, as stated").contains("6.4"), "{text}");
    assert!(text.contains("hearsay.md:12: contradiction: B is stated as the winner"), "{text}");
    // D = (0.25·3 + 0.2·2 + 0.25·5)/0.9 = 2.6667 in all else, d = -2 here: 2.6667/4.6667 is 57.14 %.
    assert!(text.contains("above 57.14 %: B"), "{text}");
}

#[test]
fn a_sound_card_with_options_as_rows_passes_and_what_is_not_read_is_named() {
    let path = fixture("sound.md");
    let output = score(&path).args(["--scale", "1..5"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("note: row “Notes”"), "{text}");
    let (_, value) = json(&path);
    // 0.75·5 + 0.25·4 is 4.75, stated as 4.8.
    assert_eq!(value["options"][1]["total"]["low"], 4.75);
    assert_eq!(value["winners"], serde_json::json!(["Database"]));
}

#[test]
fn weights_say_what_they_add_up_to() {
    assert_eq!(
        only(&toml(&EVEN.replace("speed = 50", "speed = 55")), Kind::WeightSum),
        "the weights add up to 105.00, not to 100"
    );
    let shares = EVEN.replace("speed = 50", "speed = 0.5").replace("memory = 50", "memory = 0.4");
    assert_eq!(only(&toml(&shares), Kind::WeightSum), "the weights add up to 0.90, not to 1");
    assert!(toml(&EVEN.replace("= 50", "= 0.5")).is_clean());
    let stated = "| | Weight | A |\n|-|-|-|\n| x | 60 | 5 |\n| y | 40 | 5 |\n| Total | 110 % | 5 |\n";
    assert!(only(&markdown(stated), Kind::WeightSum).contains("stated as 110, but they add up to 100"));
}

#[test]
fn a_total_is_right_at_the_digits_that_it_states() {
    let with =
        |total: &str| toml(&EVEN.replace("memory = 8 }", &format!("memory = 7.45 }}\ntotal = {total}")));
    // 8.225
    for right in ["8", "8.2", "8.22", "8.23", "8.225"] {
        assert!(with(right).is_clean(), "{right}: {:?}", with(right).findings);
    }
    for wrong in ["9", "8.3", "8.20", "8.226"] {
        assert_eq!(kinds(&with(wrong)), [Kind::Total], "{wrong}");
    }
}

#[test]
fn totals_out_of_100_in_percent_or_in_points_are_understood() {
    let with = |a: &str| {
        markdown(&format!(
            "| | Weight | A |\n|-|-|-|\n| x | 60 % | 9 |\n| y | 40 % | 8 |\n| Weighted | | {a} |\n"
        ))
    };
    for right in ["8.6", "86 %", "86/100", "8.6/10", "860", "8,6", "**8.60**"] {
        assert!(with(right).is_clean(), "{right}: {:?}", with(right).findings);
    }
    for wrong in ["87 %", "86", "850", "8.6/5", "8.5"] {
        assert_eq!(kinds(&with(wrong)), [Kind::Total], "{wrong}");
    }
    assert_eq!(kinds(&with("about 8.6")), [Kind::NotUnderstood]);
}

#[test]
fn contributions_are_checked_in_brackets_and_in_columns() {
    let bracket =
        |c: &str| markdown(&format!("| | Weight | A |\n|-|-|-|\n| x | 60 % | 9 ({c}) |\n| y | 40 % | 8 |\n"));
    assert!(bracket("5.4").is_clean() && bracket("540").is_clean());
    assert!(
        only(&bracket("5.5"), Kind::Contribution)
            .contains("A, x: the contribution is stated as 5.5, but 60 % · 9 is 5.40")
    );
    let column = |c: &str| {
        markdown(&format!(
            "| | Weight | A | Weighted | B | B weighted |\n|-|-|-|-|-|-|\n| x | 60 | 9 | 5.4 | 6 | {c} |\n\
             | y | 40 | 8 | 3.2 | 5 | 2.0 |\n| Total | | | 8.6 | | 5.6 |\n"
        ))
    };
    assert!(column("3.6").is_clean(), "{:?}", column("3.6").findings);
    assert!(only(&column("3.7"), Kind::Contribution).contains("B, x"));
}

#[test]
fn a_winner_of_a_criterion_has_its_highest_score() {
    let with = |name: &str| toml(&format!("{EVEN}[winners]\nspeed = \"{name}\"\n"));
    assert!(with("A").is_clean());
    let text = only(&with("B"), Kind::CriterionWinner);
    assert_eq!(text, "speed: B is stated as the winner, but A has a higher score: 9.00 against 6.00");
    assert!(
        only(&with("tie"), Kind::CriterionWinner).contains("a tie is stated, but A has the highest score")
    );
    assert!(only(&with("A, B"), Kind::CriterionWinner).contains("B is stated"));
    assert!(only(&with("C"), Kind::NotUnderstood).contains("“C”"));
}

#[test]
fn ties_are_no_wins() {
    let even = EVEN.replace("speed = 6, memory = 7", "speed = 9, memory = 8");
    let text = only(&toml(&format!("winner = \"A\"\n{even}")), Kind::TieStatedAsWin);
    assert_eq!(text, "A is stated as the winner, but B has the same total, 8.50");
    assert!(toml(&format!("winner = \"A and B\"\n{even}")).is_clean());
    assert!(toml(&format!("winner = \"tie\"\n{even}")).is_clean());
    assert_eq!(toml(&even).break_even, None);
}

#[test]
fn ranks_follow_the_totals() {
    let card = |ranks: [&str; 3]| {
        let [a, b, c] = ranks;
        markdown(&format!(
            "| | Weight | A | B | C |\n|-|-|-|-|-|\n| x | 100 | 9 | 9 | 5 |\n| Rank | | {a} | {b} | {c} |\n"
        ))
    };
    for right in [["1", "1", "3"], ["1st", "1st", "2nd"], ["1.5", "1.5", "3"]] {
        assert!(card(right).is_clean(), "{right:?}: {:?}", card(right).findings);
    }
    assert!(
        only(&card(["1", "2", "3"]), Kind::TieStatedAsWin)
            .contains("B: the rank is stated as 2, but it is 1")
    );
    assert_eq!(kinds(&card(["3", "1", "1"])), [Kind::TieStatedAsWin, Kind::Rank]);
    assert_eq!(kinds(&card(["1", "1", "third"])), [Kind::NotUnderstood]);
}

#[test]
fn scores_have_to_be_on_the_scale() {
    assert!(
        only(&toml(&EVEN.replace("speed = 9", "speed = 11")), Kind::OutOfScale)
            .contains("11 is outside the scale from 0 to 10")
    );
    assert!(toml(&format!("scale = [0, 20]\n{}", EVEN.replace("speed = 9", "speed = 11"))).is_clean());
    assert!(markdown("| | Weight | A |\n|-|-|-|\n| x | 100 | 4/5 |\n| Total | | 80 % |\n").is_clean());
    let mixed = markdown("| | Weight | A |\n|-|-|-|\n| x | 50 | 4/5 |\n| y | 50 | 9/10 |\n");
    assert_eq!(kinds(&mixed), [Kind::NotUnderstood]);
}

#[test]
fn a_missing_score_makes_the_total_an_interval() {
    let text = EVEN.replace("scores = { speed = 9, memory = 8 }", "scores = { speed = 9 }\ntotal = 9.6");
    let checked = toml(&format!("winner = \"A\"\n{text}"));
    assert_eq!(kinds(&checked), [Kind::Undecided, Kind::MissingScore, Kind::Total]);
    // 9 · 50 % with 0 to 10 · 50 %.
    assert_eq!((checked.options[0].total.low, checked.options[0].total.high), (4.5, 9.5));
    assert!(checked.findings[1].text.contains("A, memory"), "{:?}", checked.findings);
    assert!(checked.findings[2].text.contains("from 4.50 to 9.50"), "{:?}", checked.findings);
    assert_eq!(kinds(&toml(&text.replace("9.6", "7"))), [Kind::MissingScore]);
    for blank in ["", "-", "n/a", "?"] {
        let card = format!("| | Weight | A |\n|-|-|-|\n| x | 50 | {blank} |\n| y | 50 | 9 |\n");
        assert_eq!(kinds(&markdown(&card)), [Kind::MissingScore], "{blank}");
    }
}

#[test]
fn a_decision_that_no_missing_score_can_save_is_a_contradiction() {
    let text = EVEN.replace("scores = { speed = 6, memory = 7 }", "scores = { speed = 6 }");
    // B reaches 3 to 8, A has 8.5.
    assert_eq!(kinds(&toml(&format!("winner = \"B\"\n{text}"))), [Kind::Decision, Kind::MissingScore]);
    assert_eq!(kinds(&toml(&format!("winner = \"A\"\n{text}"))), [Kind::MissingScore]);
}

#[test]
fn what_is_there_twice_is_named() {
    let text =
        "| | Weight | A | a |\n|-|-|-|-|\n| Ease of use | 50 | 5 | 5 |\n| ease  of use | 50 | 5 | 5 |\n";
    let checked = markdown(text);
    assert_eq!(kinds(&checked), [Kind::Duplicate, Kind::Duplicate]);
    assert!(
        checked.findings[0].text.contains("option a") && checked.findings[1].text.contains("ease  of use")
    );
}

#[test]
fn a_dominated_option_and_the_weights_that_would_turn_the_outcome() {
    let checked = toml(EVEN);
    assert_eq!(checked.options[1].dominated_by.as_deref(), Some("A"));
    assert!(checked.break_even.unwrap().iter().all(|b| b.below.is_none() && b.above.is_none()));

    // By hand: three criteria, 50/30/20; A 8, 4, 6 (6.4) and B 5, 9, 5 (6.2).
    let checked = toml(
        "[weights]\nx = 50\ny = 30\nz = 20\n[options.A]\nscores = { x = 8, y = 4, z = 6 }\n\
         [options.B]\nscores = { x = 5, y = 9, z = 5 }\n",
    );
    let turns = checked.break_even.unwrap();
    // x: d = 3, D = (0.3·(−5) + 0.2·1)/0.5 = −2.6; −2.6/(−2.6 − 3) = 0.4643.
    let below = turns[0].below.as_ref().unwrap();
    assert!((below.weight - 2.6 / 5.6).abs() < 1e-12 && below.winners == ["B"] && turns[0].above.is_none());
    // y: d = −5, D = (0.5·3 + 0.2·1)/0.7 = 2.42857; 2.42857/7.42857 = 0.3269.
    let above = turns[1].above.as_ref().unwrap();
    assert!((above.weight - 1.7 / 5.2).abs() < 1e-12 && turns[1].below.is_none());
    // z: d = 1, D = (0.5·3 − 0.3·5)/0.8 = 0: level only without z, so nothing turns.
    assert!(turns[2].below.is_none() && turns[2].above.is_none());
}

#[test]
fn at_the_break_even_weight_the_totals_are_equal() {
    let card = |x: f64| {
        let rest = (100.0 - x) / 50.0;
        format!(
            "[weights]\nx = {x}\ny = {}\nz = {}\n[options.A]\nscores = {{ x = 8, y = 4, z = 6 }}\n\
             [options.B]\nscores = {{ x = 5, y = 9, z = 5 }}\n",
            30.0 * rest,
            20.0 * rest
        )
    };
    let turn = toml(&card(50.0)).break_even.unwrap()[0].below.clone().unwrap().weight * 100.0;
    let totals = |x: f64| toml(&card(x)).options.iter().map(|o| o.total.low).collect::<Vec<_>>();
    assert!((totals(turn)[0] - totals(turn)[1]).abs() < 1e-9);
    assert!(totals(turn + 1.0)[0] > totals(turn + 1.0)[1] && totals(turn - 1.0)[0] < totals(turn - 1.0)[1]);
}

#[test]
fn sentences_name_the_decision_or_it_is_said_that_they_do_not() {
    let with = |text: &str| {
        markdown(&format!("| | Weight | Alpha | Beta |\n|-|-|-|-|\n| x | 100 | 9 | 5 |\n\n{text}\n"))
    };
    for right in [
        "Decision: Alpha.",
        "> **Winner:** Alpha",
        "Recommendation: Alpha over Beta",
        "## Decision\n\nWe choose Alpha, not Beta.",
        "- Overall winner: alpha",
        "Nothing here.",
        "| Decision | Alpha |\n|-|-|\n",
        "Decision:\nAlpha",
        "The decision on Beta comes later: Beta.",
    ] {
        assert!(with(right).is_clean(), "{right}: {:?}", with(right).findings);
    }
    for wrong in [
        "Decision: Beta",
        "Winner: **Beta** because Alpha is slow",
        "### Recommendation\nBeta",
        "| a | b |\n|-|-|\n| Decision | Beta |\n",
    ] {
        assert_eq!(kinds(&with(wrong)), [Kind::Decision], "{wrong}");
    }
    for unclear in ["Decision: Gamma", "Decision: not Beta", "Winner: Alpha or Beta"] {
        assert_eq!(kinds(&with(unclear)), [Kind::NotUnderstood], "{unclear}");
    }
}

#[test]
fn nothing_in_the_table_is_left_out_silently() {
    let table = "| | Weight | A | Why |\n|-|-|-|-|\n| **Group** | | | |\n| x | 100 | 9 | it is | more |\n| y | 0 | nine | so |\n";
    let checked = markdown(table);
    let mut texts: Vec<&str> = checked.findings.iter().map(|f| f.text.as_str()).collect();
    texts.sort_unstable();
    assert_eq!(
        texts,
        [
            "A, y: the score: “nine” is no number that is understood",
            "column “Why” holds text",
            "row “Group” has neither a weight nor scores",
            "the row has 5 cells, the table has fewer columns",
        ]
    );
}

#[test]
fn bad_input_names_the_place() {
    let cases = [
        ("a.toml", EVEN.replace("[options.A]\n", "[options.A]\ntotall = 8\n"), "totall"),
        ("a.toml", EVEN.replace("speed = 9", "sped = 9"), "line 5: options.A.scores: sped has no weight"),
        ("a.toml", EVEN.replace("speed = 50", "speed = -50"), "line 2: speed: the weight is -50, which"),
        ("a.toml", EVEN.replace("speed = 50", "speed = nan"), "line 2: speed: the weight is NaN"),
        ("a.toml", EVEN.replace("speed = 9", "speed = inf"), "line 5: A: a score is no finite number"),
        ("a.toml", format!("scale = [10, 0]\n{EVEN}"), "scale: 10 to 0 is no range"),
        ("a.toml", format!("{EVEN}[winners]\nprice = \"A\"\n"), "winners: price is no criterion"),
        ("a.toml", EVEN.replace("[options.B]", "[options.A]"), "A"),
        ("a.md", "no table".to_owned(), "no table with a weight column"),
        (
            "a.md",
            "| | Weight | A |\n|-|-|-|\n| x | much | 9 |\n".to_owned(),
            "line 3: x: “much” is no weight",
        ),
        (
            "a.md",
            "| | Weight | Weights | A |\n|-|-|-|-|\n| x | 1 | 1 | 9 |\n".to_owned(),
            "several weight columns",
        ),
    ];
    for (name, text, expected) in cases {
        let message = refusal(name, &text, &[]);
        assert!(message.contains(expected) && message.contains(name), "{expected}: {message}");
    }
    let two = "| | Weight | A |\n|-|-|-|\n| x | 1 | 9 |\n\n".repeat(2);
    assert!(refusal("a.md", &two, &[]).contains("--table with its line, one of 1, 5"));
    assert!(refusal("a.md", &two, &["--table", "3"]).contains("lines 1, 5"));
    assert!(refusal("a.toml", EVEN, &["--scale", "5..1"]).contains("no range"));
    assert_eq!(check(&parse_markdown(&two, None, Some(5)).unwrap()).options.len(), 1);
    let output = score(Path::new("no/such.md")).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no/such.md"));
}

/// A card as numbers, to be written in both forms.
#[derive(Debug, Clone)]
struct Plain {
    weights: Vec<u32>,
    /// By option, then by criterion, in tenths.
    scores: Vec<Vec<Option<u32>>>,
    totals: Vec<Option<u32>>,
    winner: Option<usize>,
    winners: Vec<Option<usize>>,
}

fn plain() -> impl Strategy<Value = Plain> {
    (1usize..6, 1usize..5).prop_flat_map(|(criteria, options)| {
        let score = proptest::option::weighted(0.9, 0u32..110);
        (
            proptest::collection::vec(2u32..60, criteria),
            proptest::collection::vec(proptest::collection::vec(score, criteria), options),
            proptest::collection::vec(proptest::option::of(0u32..100), options),
            proptest::option::of(0..options),
            proptest::collection::vec(proptest::option::of(0..options), criteria),
        )
            .prop_map(|(weights, scores, totals, winner, winners)| Plain {
                weights,
                scores,
                totals,
                winner,
                winners,
            })
    })
}

fn tenths(value: u32) -> String {
    format!("{}.{}", value / 10, value % 10)
}

impl Plain {
    fn toml(&self) -> String {
        let mut text = self.winner.map_or(String::new(), |w| format!("winner = \"option {w}\"\n"));
        text += "[weights]\n";
        for (k, weight) in self.weights.iter().enumerate() {
            text += &format!("\"criterion {k}\" = {weight}\n");
        }
        for (o, scores) in self.scores.iter().enumerate() {
            text += &format!("[options.\"option {o}\"]\n");
            text += &self.totals[o].map_or(String::new(), |t| format!("total = {}\n", tenths(t)));
            text += &format!("[options.\"option {o}\".scores]\n");
            for (k, score) in scores.iter().enumerate() {
                text += &score.map_or(String::new(), |s| format!("\"criterion {k}\" = {}\n", tenths(s)));
            }
        }
        text += "[winners]\n";
        for (k, winner) in self.winners.iter().enumerate() {
            text += &winner.map_or(String::new(), |w| format!("\"criterion {k}\" = \"option {w}\"\n"));
        }
        text
    }

    fn markdown(&self) -> String {
        let options: String = (0..self.scores.len()).map(|o| format!(" option {o} |")).collect();
        let mut text = format!(
            "# T\n\n| Criterion | Weight |{options} Winner |\n|---|---|{}---|\n",
            "---|".repeat(self.scores.len())
        );
        for (k, weight) in self.weights.iter().enumerate() {
            text += &format!("| criterion {k} | {weight} % |");
            for scores in &self.scores {
                text += &scores[k].map_or(" |".to_owned(), |s| format!(" {} |", tenths(s)));
            }
            text += &self.winners[k].map_or(" |\n".to_owned(), |w| format!(" option {w} |\n"));
        }
        text += "| **Total** | |";
        for total in &self.totals {
            text += &total.map_or(" |".to_owned(), |t| format!(" **{}** |", tenths(t)));
        }
        text += " |\n";
        text += &self.winner.map_or(String::new(), |w| format!("\nDecision: **option {w}**, for now.\n"));
        text
    }

    /// The same card with the criteria in another order.
    fn turned(&self, by: usize) -> Self {
        let mut card = self.clone();
        let by = by % card.weights.len();
        card.weights.rotate_left(by);
        card.winners.rotate_left(by);
        card.scores.iter_mut().for_each(|scores| scores.rotate_left(by));
        card
    }
}

/// Without the lines, which differ, in one order.
fn texts(checked: &Checked) -> Vec<(Kind, String)> {
    let mut all: Vec<_> = checked.findings.iter().map(|f| (f.kind, f.text.clone())).collect();
    all.sort_by(|a, b| a.1.cmp(&b.1));
    all
}

proptest! {
    #[test]
    fn toml_and_markdown_give_the_same(card in plain()) {
        let (a, b) = (toml(&card.toml()), markdown(&card.markdown()));
        prop_assert_eq!(texts(&a), texts(&b));
        prop_assert_eq!(a.options, b.options);
        prop_assert_eq!(a.break_even, b.break_even);
    }

    #[test]
    fn the_order_of_criteria_changes_no_total(card in plain(), by in 0usize..6) {
        let (a, b) = (toml(&card.toml()), toml(&card.turned(by).toml()));
        for (a, b) in a.options.iter().zip(&b.options) {
            prop_assert!((a.total.low - b.total.low).abs() < 1e-9 && (a.total.high - b.total.high).abs() < 1e-9);
            prop_assert_eq!(a.rank, b.rank);
        }
        prop_assert_eq!(a.winners, b.winners);
    }

    #[test]
    fn a_total_stated_as_recomputed_is_right(card in plain()) {
        let mut card = card;
        card.totals.iter_mut().for_each(|t| *t = None);
        let checked = toml(&card.toml());
        let stated: String = checked.options.iter().map(|o| format!(" {:.3} |", o.total.low)).collect();
        let text = card.markdown().replace(&format!("| **Total** | |{}", " |".repeat(card.scores.len())), &format!("| Total | |{stated}"));
        prop_assert!(text.contains("| Total |"));
        prop_assert!(markdown(&text).findings.iter().all(|f| f.kind != Kind::Total));
    }

    #[test]
    fn garbage_never_panics(text in "(\\PC|[|\n:*-]|Weight|Total|Winner|Decision: |[0-9.,%/()]){0,200}") {
        let _ = parse_markdown(&text, None, None).map(|card| check(&card));
        let _ = parse_toml(&text, None).map(|card| check(&card));
    }

    #[test]
    fn garbage_in_a_table_never_panics(cells in proptest::collection::vec("(\\PC|[0-9.,%/() -]|weighted|A|B){0,12}", 20)) {
        let rows: String = cells.chunks(4).map(|row| format!("| {} |\n", row.join(" | "))).collect();
        let text = format!("| | Weight | A | B |\n|-|-|-|-|\n| x | 5 | 1 | 2 |\n{rows}\nWinner: {}\n", cells[0]);
        if let Ok(card) = parse_markdown(&text, None, None) {
            let checked = check(&card);
            let shown = evalfw::scorecard::present::text(&checked, "card.md");
            prop_assert!(shown.contains("total, recomputed"));
        }
    }
}
