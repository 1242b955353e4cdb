//! Clients: what they ask, what they must get, and the check of each event against an oracle that shares no code with
//! the scheduler, the text assembly or the resume path.

use std::sync::Arc;

use inference::{FinishReason, Priority, StopRules, fake_next_token};
use rand::Rng;
use words::{Code, ModelId};

use crate::context::Context;
use crate::counters::Count;
use crate::node::CONTEXT_LENGTH;
use crate::talk::Order;

/// How a request ended, as its client saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With all that was asked for.
    Done,
    /// With an error.
    Failed(Code),
    /// The client went away.
    Left,
    /// Its connection broke, because its gateway died.
    Broken,
    /// With what it had when it was cancelled.
    Cut,
}

/// What the fleet must answer to one choice, if nodes of one build do.
#[derive(Clone, Debug)]
struct Expected {
    text: String,
    tokens: usize,
    finish: FinishReason,
}

/// One client with its one request.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) number: usize,
    pub(crate) order: Arc<Order>,
    pub(crate) gateway: usize,
    pub(crate) reading: bool,
    /// Answers that agree with all that came so far, one a build.
    expected: Vec<Expected>,
    got: Vec<(String, Option<FinishReason>)>,
    pub(crate) ended: Option<Ended>,
    /// An operator wants it to end with what it has.
    pub(crate) cancelled: bool,
}

/// Puts a build's way to read a prompt into the prompt: its "template".
pub(crate) fn read_prompt(prompt: &[u32], reads: u64) -> Vec<u32> {
    prompt.iter().copied().chain([u32::from(b'0') + reads as u32]).collect()
}

/// Answers by the oracle: the whole context anew for each token, bytes to text by hand.
fn expect(prompt: &[u32], order: &Order) -> Expected {
    let mut context = prompt.to_vec();
    let limit = order.max_tokens.min(CONTEXT_LENGTH - prompt.len());
    let (mut text, mut half) = (String::new(), false);
    loop {
        let id = fake_next_token(&context);
        context.push(id);
        if half {
            // 0xc3 and its second half are U+00C0 to U+00FF.
            text.push(char::from_u32(0xc0 + id - 0x80).unwrap_or('?'));
            half = false;
        } else if id == 0xc3 {
            half = true;
        } else {
            text.push(id as u8 as char);
        }
        let tokens = context.len() - prompt.len();
        let stops = order.stop.strings.iter().filter(|stop| !half && text.ends_with(stop.as_str()));
        if let Some(length) = stops.map(String::len).max() {
            text.truncate(text.len() - length);
            return Expected { text, tokens, finish: FinishReason::Stop };
        }
        if tokens >= limit {
            text.extend(half.then_some(char::REPLACEMENT_CHARACTER));
            return Expected { text, tokens, finish: FinishReason::Length };
        }
    }
}

/// Says what a build that reads `prompt` so answers.
pub(crate) fn answer(prompt: &[u32], order: &Order) -> String {
    expect(prompt, order).text
}

impl Client {
    /// Draws a client and its request.
    pub(crate) fn draw(context: &mut Context, number: usize, gateway: usize) -> Self {
        let rng = &mut context.rng;
        let model = rng.random_range(0..context.plan.models + context.plan.on_demand);
        let prompt: Arc<[u32]> =
            (0..rng.random_range(1..=60)).map(|_| u32::from(b'a') + rng.random_range(0..26)).collect();
        let long = rng.random_bool(0.1);
        let max_tokens = if long { rng.random_range(60..=220) } else { rng.random_range(1..=50) };
        let choices = if rng.random_bool(0.15) { rng.random_range(2..=3) } else { 1 };
        let priority = match rng.random_range(0..10) {
            0 => Priority::High,
            1 => Priority::Low,
            _ => Priority::Normal,
        };
        let streamed = rng.random_bool(0.8);
        let order = |strings| Order {
            model: model_id(model),
            prompt: prompt.clone(),
            choices,
            max_tokens,
            stop: Arc::new(StopRules { strings, tokens: Vec::new() }),
            priority,
            streamed,
        };
        let builds = context.plan.builds(model);
        let plain = order(Vec::new());
        let answers = |order: &Order| -> Vec<Expected> {
            builds.iter().map(|reads| expect(&read_prompt(&prompt, *reads), order)).collect()
        };
        let (mut expected, mut order_of) = (answers(&plain), plain);
        if context.rng.random_bool(0.2) {
            // A piece of the answer itself, so that it is met, over the border of tokens at times.
            let text = &expected[0].text;
            let from = context.rng.random_range(0..=text.chars().count() / 2);
            let stop: String = text.chars().skip(from).take(context.rng.random_range(1..=4)).collect();
            if !stop.is_empty() && !stop.contains(char::REPLACEMENT_CHARACTER) {
                context.count(Count::StopStrings);
                order_of = order(vec![stop]);
                expected = answers(&order_of);
            }
        }
        context.count(Count::Request);
        if choices > 1 {
            context.count(Count::SeveralChoices);
        }
        let got = vec![Default::default(); choices];
        Client {
            number,
            order: Arc::new(order_of),
            gateway,
            reading: true,
            expected,
            got,
            ended: None,
            cancelled: false,
        }
    }

    /// Takes an event of the stream.
    pub(crate) fn event(&mut self, context: &mut Context, choice: u32, text: &str, finish: Option<FinishReason>) {
        let number = self.number;
        context.check(self.ended.is_none(), "ST1", || format!("request {number} goes on after its end"));
        context.count(Count::Token);
        let Some((got, finished)) = self.got.get_mut(choice as usize) else {
            return context.breach("ST2", || format!("request {number} got a choice {choice} that nobody asked for"));
        };
        let over = finished.is_some();
        context.check(!over, "ST2", || format!("choice {choice} of request {number} goes on after its finish"));
        got.push_str(text);
        *finished = finish;
        let got = got.as_str();
        self.expected.retain(|expected| match finish {
            Some(finish) => expected.text == got && expected.finish == finish,
            None => expected.text.starts_with(got),
        });
        let agrees = !self.expected.is_empty();
        context.check(agrees, "ST2", || format!("request {number} got {got:?}, which no build says"));
    }

    /// Takes a whole answer in one piece.
    fn whole(&mut self, context: &mut Context, answers: &[(String, Option<FinishReason>)]) {
        let number = self.number;
        context.check(answers.len() == self.got.len(), "ST2", || format!("request {number} lacks a choice"));
        for (choice, (text, finish)) in (0u32..).zip(answers) {
            self.event(context, choice, text, *finish);
        }
    }

    /// Takes the end of a good answer with the tokens that it claims to have.
    pub(crate) fn done(
        &mut self,
        context: &mut Context,
        completion_tokens: usize,
        answers: &[(String, Option<FinishReason>)],
    ) {
        if !self.order.streamed {
            self.whole(context, answers);
        }
        let (number, choices) = (self.number, self.got.len());
        let finished = self.got.iter().all(|(_, finish)| finish.is_some());
        context.check(finished, "ST2", || format!("request {number} is done, but a choice is not"));
        let right = self.expected.iter().any(|expected| expected.tokens * choices == completion_tokens);
        let expected = self.expected.first().map(|expected| expected.tokens * choices);
        context.check(right, "ST2", || {
            format!("request {number} was billed {completion_tokens} tokens, not {expected:?}")
        });
        self.end(context, Ended::Done);
    }

    /// Takes the end of an answer that was cancelled: `last` is the text that each choice still held back.
    pub(crate) fn cut(&mut self, context: &mut Context, completion_tokens: usize, last: &[(u32, String)]) {
        let (number, choices) = (self.number, self.got.len());
        context.check(self.cancelled, "CN1", || format!("request {number} was ended, and nobody wanted that"));
        for (choice, text) in last {
            let Some((got, None)) = self.got.get_mut(*choice as usize) else { continue };
            got.push_str(text.trim_end_matches(char::REPLACEMENT_CHARACTER));
            let got = got.as_str();
            // What may yet have become a stop string is told now.
            let stops = !self.order.stop.strings.is_empty();
            let agrees = self.expected.iter().any(|expected| stops || expected.text.starts_with(got));
            context.check(agrees, "ST2", || format!("request {number} was cut at {got:?}, which no build says"));
        }
        let most = self.expected.iter().map(|expected| expected.tokens * choices).max().unwrap_or_default();
        context.check(completion_tokens <= most, "ST2", || {
            format!("request {number} was billed {completion_tokens} tokens of {most}")
        });
        self.end(context, Ended::Cut);
    }

    /// Takes the end, whatever it is.
    pub(crate) fn end(&mut self, context: &mut Context, ended: Ended) {
        let number = self.number;
        let before = self.ended;
        context.check(before.is_none(), "ST1", || format!("request {number} ends twice: {before:?}, {ended:?}"));
        if before.is_some() {
            return;
        }
        self.ended = Some(ended);
        let (count, text) = match ended {
            Ended::Done => (Count::Done, "client #: done"),
            Ended::Failed(_) => (Count::Failed, "client #: failed with HTTP status #"),
            Ended::Left => (Count::Left, "client #: left"),
            Ended::Broken => (Count::GatewayDied, "client #: its gateway died"),
            Ended::Cut => (Count::CutShort, "client #: ended by its cancelling"),
        };
        let status = if let Ended::Failed(code) = ended { code.row().http } else { 0 };
        context.count(count);
        context.note(text, &[number as u64, u64::from(status)]);
    }
}

/// Names a model by its place.
pub(crate) fn model_id(model: usize) -> ModelId {
    const NAMES: [&str; 5] = ["m0", "m1", "m2", "m3", "m4"];
    // The names are ids by construction; `m0` stands in for a place that no plan has.
    ModelId::new(NAMES.get(model).copied().unwrap_or("m0")).unwrap_or_else(|_| unreachable!("a plain name"))
}
