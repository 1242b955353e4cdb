//! The text: questions with their answers, and short dialogues.

use std::path::Path;

use anyhow::{Context, Result, ensure};

/// One answer with the ways to ask for it.
#[derive(Debug, Default)]
pub struct Question {
    /// Asked in training.
    pub trained: Vec<String>,
    /// Held out.
    pub unseen: Vec<String>,
    /// The answer.
    pub answer: String,
}

/// Turns of (user, model).
pub type Dialogue = Vec<(String, String)>;

/// All the text.
#[derive(Debug, Default)]
pub struct Corpus {
    /// Single questions.
    pub questions: Vec<Question>,
    /// Longer exchanges.
    pub dialogues: Vec<Dialogue>,
}

fn blocks(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.split("\n\n").map(|block| block.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect())
}

impl Corpus {
    /// Reads the corpus folder.
    pub fn read(home: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = home.join("corpus").join(name);
            std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        let mut corpus = Corpus::default();
        for block in blocks(&read("questions.txt")?).filter(|block| !block.is_empty()) {
            let mut question = Question::default();
            for line in block {
                let (mark, text) = line.split_at(1);
                match mark {
                    "?" => question.trained.push(text.trim().into()),
                    "!" => question.unseen.push(text.trim().into()),
                    "=" => question.answer = text.trim().into(),
                    _ => anyhow::bail!("a line of questions.txt starts with none of ? ! =: {line}"),
                }
            }
            ensure!(!question.answer.is_empty() && !question.trained.is_empty(), "a block without question or answer");
            corpus.questions.push(question);
        }
        for block in blocks(&read("dialogues.txt")?).filter(|block| !block.is_empty()) {
            let mut dialogue = Dialogue::new();
            for pair in block.chunks(2) {
                ensure!(pair.len() == 2, "a dialogue ends with a question");
                let user = pair[0].strip_prefix('>').context("a user's line starts with >")?;
                let model = pair[1].strip_prefix('<').context("a model's line starts with <")?;
                dialogue.push((user.trim().into(), model.trim().into()));
            }
            corpus.dialogues.push(dialogue);
        }
        Ok(corpus)
    }

    /// Returns all text, for the tokenizer.
    pub fn text(&self) -> Vec<String> {
        let questions = self.questions.iter().flat_map(|q| q.trained.iter().chain([&q.answer]));
        let turns = self.dialogues.iter().flatten().flat_map(|(user, model)| [user, model]);
        questions.chain(turns).cloned().collect()
    }

    /// Returns every training exchange: each question as written, and in lower case without its mark.
    pub fn exchanges(&self) -> Vec<Dialogue> {
        let mut all = self.dialogues.clone();
        for question in &self.questions {
            for asked in &question.trained {
                let plain = asked.to_lowercase().trim_end_matches(['?', '.']).to_string();
                all.push(vec![(asked.clone(), question.answer.clone())]);
                if plain != *asked {
                    all.push(vec![(plain, question.answer.clone())]);
                }
            }
        }
        all
    }
}
