//! A timeline of bounded length.

use super::MemoryPoint;

/// The timeline is thinned to half whenever it reaches this length.
const MAX_POINTS: usize = 1_000;

/// Keeps each interval's largest value.
#[derive(Default)]
pub struct Timeline {
    points: Vec<MemoryPoint>,
    /// Samples that are folded into one point: 1, 2, 4, ...
    stride: usize,
    folded: usize,
}

impl Timeline {
    pub fn push(&mut self, point: MemoryPoint) {
        self.stride = self.stride.max(1);
        match self.points.last_mut() {
            Some(last) if self.folded < self.stride => {
                if point.resident_bytes > last.resident_bytes {
                    *last = point;
                }
            }
            _ => {
                self.points.push(point);
                self.folded = 0;
            }
        }
        self.folded += 1;
        if self.points.len() >= MAX_POINTS {
            self.points = self.points.chunks(2).map(larger).collect();
            self.stride *= 2;
        }
    }

    pub fn take(&mut self) -> Vec<MemoryPoint> {
        std::mem::take(&mut self.points)
    }
}

fn larger(points: &[MemoryPoint]) -> MemoryPoint {
    let first = points[0];
    points.iter().fold(first, |a, b| if b.resident_bytes > a.resident_bytes { *b } else { a })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_timeline_stays_bounded_and_keeps_its_spike() {
        let mut timeline = Timeline::default();
        for i in 0..100_000u64 {
            let resident_bytes = if i == 54_321 { 1_000_000 } else { i % 7 };
            timeline.push(MemoryPoint { seconds: i as f64, resident_bytes });
        }
        assert!(timeline.points.len() <= MAX_POINTS);
        assert!(timeline.points.iter().any(|p| p.seconds == 54_321.0 && p.resident_bytes == 1_000_000));
        assert!(timeline.points.windows(2).all(|w| w[0].seconds < w[1].seconds));
        assert!(timeline.points.last().unwrap().seconds > 99_000.0);
    }
}
