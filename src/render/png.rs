//! Charts as PNG, for where SVG is not shown. With a font of our own, so that every machine draws the same.

use anyhow::{Context, Result};
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree, fontdb};
use std::sync::Arc;

/// DejaVu Sans, Latin, Greek and the signs that reports use; licence and making: `fonts/README.md`.
const FONT: &[u8] = include_bytes!("fonts/DejaVuSans-Latin.ttf");
const FAMILY: &str = "DejaVu Sans";
/// Pixels for a unit of the SVG.
const SCALE: f32 = 2.0;

/// Draws an SVG at twice its size. The machine's own fonts are not used: a character that the font lacks is left out.
pub fn png(svg: &str) -> Result<Vec<u8>> {
    let tree = Tree::from_str(svg, &options()).context("the SVG cannot be read")?;
    let size = tree.size().to_int_size().scale_by(SCALE).context("the picture has no size")?;
    let mut pixels = Pixmap::new(size.width(), size.height()).context("the picture is too large")?;
    resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    pixels.encode_png().context("the picture cannot be written as PNG")
}

fn options() -> Options<'static> {
    let mut fonts = fontdb::Database::new();
    fonts.load_font_data(FONT.to_vec());
    fonts.set_sans_serif_family(FAMILY);
    Options { font_family: FAMILY.to_owned(), fontdb: Arc::new(fonts), ..Options::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::charts::stacked;

    fn with(text: &str) -> String {
        format!(
            "<svg width=\"200\" height=\"60\" xmlns=\"http://www.w3.org/2000/svg\">\
             <rect width=\"200\" height=\"60\" fill=\"#FFFFFF\"/>\
             <text x=\"10\" y=\"40\" font-family=\"sans-serif\" font-size=\"24\" fill=\"#000000\">{text}</text></svg>"
        )
    }

    /// Dark pixels in the left and the right half.
    fn ink(svg: &str) -> (usize, usize) {
        let picture = Pixmap::decode_png(&png(svg).unwrap()).unwrap();
        let width = picture.width() as usize;
        let dark = |half: usize| {
            let pixels = picture.pixels().iter().enumerate();
            pixels.filter(|(i, p)| (i % width) / (width / 2) == half && p.red() < 128).count()
        };
        (dark(0), dark(1))
    }

    #[test]
    fn a_picture_is_twice_as_large_and_always_the_same() {
        let bars = [("candle".to_owned(), vec![2.0, 3.0])];
        let svg =
            stacked("s", "Totals", &["a".to_owned(), "b".to_owned()], &bars, &[1.0], "points").unwrap().svg;
        let picture = png(&svg).unwrap();
        assert_eq!(picture, png(&svg).unwrap());
        let decoded = Pixmap::decode_png(&picture).unwrap();
        assert_eq!(decoded.width(), 2 * 860);
        let height = svg.split("height=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(decoded.height(), 2 * height.parse::<u32>().unwrap());
    }

    #[test]
    fn text_is_drawn_where_it_stands() {
        assert_eq!(ink(&with("")), (0, 0));
        let (left, right) = ink(&with("evalfw"));
        assert!(left > 500 && right < left / 10, "{left} {right}");
    }

    #[test]
    fn the_font_has_what_reports_write() {
        // A missing character would be left out, or drawn as the same box as any other.
        let of_box = ink(&with("\u{4e2d}"));
        for c in "Aé–—−×·≥≤±σµ“”…✓%/".chars() {
            let drawn = ink(&with(&c.to_string()));
            assert!(drawn.0 > 0 && drawn != of_box, "{c}");
        }
    }

    #[test]
    fn what_is_no_svg_is_an_error() {
        assert!(png("no").is_err());
    }
}
