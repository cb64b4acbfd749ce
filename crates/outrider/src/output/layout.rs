//! Two shapes: a list of records (columns) and one record (label and value, wrapped).

use super::text::{bold, clean};
use comfy_table::presets;
use comfy_table::{Cell, ContentArrangement, Table};

/// A list: headings over rows, no lines. Empty lists say so.
pub(crate) fn columns(headings: &[&str], rows: Vec<Vec<String>>, width: usize, when_empty: &str) -> String {
    if rows.is_empty() {
        return format!("{when_empty}\n");
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(headings.iter().map(Cell::new));
    if let Ok(width) = u16::try_from(width) {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    for row in rows {
        table.add_row(row.iter().map(|cell| clean(cell)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut out = String::new();
    for line in table.lines() {
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// One record: a title, then labels and values; values wrap under themselves.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    title: String,
    rows: Vec<(&'static str, String)>,
}

impl Facts {
    /// With a title, which may be coloured already.
    pub(crate) fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), rows: Vec::new() }
    }

    /// Adds a fact. The value is cleaned.
    pub(crate) fn add(&mut self, label: &'static str, value: impl AsRef<str>) -> &mut Self {
        self.rows.push((label, clean(value.as_ref())));
        self
    }

    /// Adds a fact where there is one.
    pub(crate) fn add_some(&mut self, label: &'static str, value: Option<impl AsRef<str>>) -> &mut Self {
        if let Some(value) = value {
            self.add(label, value);
        }
        self
    }

    /// The text.
    pub(crate) fn render(&self, width: usize) -> String {
        let indent = 2;
        let label_width = self.rows.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0) + 2;
        let mut out = format!("{}\n\n", self.title);
        for (label, value) in &self.rows {
            let room = width.saturating_sub(indent + label_width).max(20);
            for (i, line) in wrap(value, room).iter().enumerate() {
                let label = if i == 0 { *label } else { "" };
                // Padding is counted without the colour codes.
                let pad = " ".repeat(label_width - label.chars().count());
                let label = if label.is_empty() { String::new() } else { bold(label) };
                out.push_str(format!("{:indent$}{label}{pad}{line}", "").trim_end());
                out.push('\n');
            }
        }
        out
    }
}

/// Breaks at spaces, never between a number and its unit; a word that is longer than the room (a path, a digest)
/// is left whole.
pub(crate) fn wrap(text: &str, room: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in words(text) {
        let last = lines.last_mut().expect("it starts with one line and only grows");
        let needed = last.chars().count() + 1 + word.chars().count();
        if last.is_empty() {
            last.push_str(&word);
        } else if needed <= room {
            last.push(' ');
            last.push_str(&word);
        } else {
            lines.push(word);
        }
    }
    lines
}

fn words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match words.last_mut() {
            Some(number) if is_unit(word) && number.ends_with(|c: char| c.is_ascii_digit()) => {
                number.push(' ');
                number.push_str(word);
            }
            _ => words.push(word.to_owned()),
        }
    }
    words
}

fn is_unit(word: &str) -> bool {
    let word = word.trim_end_matches([',', ')', ';', '.']);
    matches!(word, "ms" | "s" | "min" | "h" | "d" | "B" | "KiB" | "MiB" | "GiB" | "TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_wrap_under_themselves() {
        let mut facts = Facts::new("title");
        facts.add("Why", "one two three four five six seven eight nine ten").add("Id", "m-1");
        let plain = anstream::adapter::strip_str(&facts.render(30)).to_string();
        assert_eq!(
            plain,
            "title\n\n  Why  one two three four five\n       six seven eight nine\n       ten\n  Id   m-1\n"
        );
    }

    #[test]
    fn an_empty_list_says_so() {
        assert_eq!(columns(&["A"], vec![], 80, "no hosts yet"), "no hosts yet\n");
    }

    #[test]
    fn a_pipe_gets_one_line_per_record() {
        let row = vec!["x".repeat(300), "y".to_owned()];
        assert_eq!(columns(&["A", "B"], vec![row], usize::MAX, "").lines().count(), 2);
    }
}
