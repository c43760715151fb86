//! How the segments of bars are filled: colour, and lines for those who see or print none.

use super::{Area, Drawn, INK, PALETTE};
use plotters::prelude::*;

#[derive(Debug, Clone, Copy)]
pub(super) enum Fill {
    /// A place in the legend: neighbours differ in colour and in how they are hatched.
    Part(usize),
    Unknown,
}

pub(super) fn draw_segment<'a>(root: &Area<'a>, fill: Fill, from: (i32, i32), to: (i32, i32)) -> Drawn<'a> {
    let corners = [from, to];
    let (ground, hatch, color) = match fill {
        Fill::Part(index) => (PALETTE[index % PALETTE.len()], Hatch::ALL[index % Hatch::ALL.len()], WHITE),
        Fill::Unknown => (WHITE, Hatch::Rising, INK),
    };
    root.draw(&Rectangle::new(corners, ground.filled()))?;
    for line in hatch.lines(from, to) {
        root.draw(&PathElement::new(line, color))?;
    }
    root.draw(&Rectangle::new(corners, INK))
}

/// What tells two segments apart without colour.
#[derive(Debug, Clone, Copy)]
enum Hatch {
    Solid,
    Rising,
    Falling,
    Upright,
}

impl Hatch {
    const ALL: [Self; 4] = [Self::Solid, Self::Rising, Self::Falling, Self::Upright];
    const STEP: i32 = 7;

    /// The lines within a rectangle. They lie on a grid of the whole picture, so that neighbours look alike.
    fn lines(self, (left, top): (i32, i32), (right, bottom): (i32, i32)) -> Vec<[(i32, i32); 2]> {
        let multiples = |from: i32, to: i32| {
            let first = from.div_euclid(Self::STEP) + 1;
            (first..).map(|i| i * Self::STEP).take_while(move |c| *c < to)
        };
        match self {
            Self::Solid => Vec::new(),
            Self::Upright => multiples(left, right).map(|x| [(x, top), (x, bottom)]).collect(),
            // x + y = c
            Self::Rising => multiples(left + top, right + bottom)
                .map(|c| {
                    let (from, to) = (left.max(c - bottom), right.min(c - top));
                    [(from, c - from), (to, c - to)]
                })
                .collect(),
            // x - y = c
            Self::Falling => multiples(left - bottom, right - top)
                .map(|c| {
                    let (from, to) = (left.max(c + top), right.min(c + bottom));
                    [(from, from - c), (to, to - c)]
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hatching_stays_within_its_rectangle() {
        for hatch in Hatch::ALL {
            for (from, to) in [((0, 0), (100, 22)), ((13, 40), (15, 62)), ((-9, -5), (3, 70))] {
                for [a, b] in hatch.lines(from, to) {
                    for (x, y) in [a, b] {
                        assert!((from.0..=to.0).contains(&x) && (from.1..=to.1).contains(&y), "{hatch:?}");
                    }
                }
            }
        }
        assert!(Hatch::Rising.lines((0, 0), (100, 22)).len() > 10);
    }
}
