//! One answer on its way out: events in, bytes out.

use axum::body::Bytes;
use inference::{EventKind, Score};
use wire::private::{Line, Meta, MetaText};
use wire::{DONE_EVENT, Encoder, Fold, KEEP_ALIVE_EVENT, data_event, error_event, with_private};
use words::{Code, Error};

use super::account::Account;
use super::outgoing::Making;
use super::output::{Output, Said};
use super::parts::Parts;
use super::telling::Telling;
use crate::engine_thread::Message;
use crate::streams::{Reason, cancelled};
use service::gate::Admission;

/// Most tokens that are held back for a gateway: what a crash costs at most besides its own second.
const HELD_MAX: usize = 64;

/// What the events become.
pub(super) enum Form {
    /// Chunks, one a token.
    Stream(Encoder),
    /// One JSON at the end.
    Whole(Fold),
}

enum State {
    /// No token yet.
    Waiting,
    /// Tokens flow.
    Flowing,
    /// The last bytes are out.
    Over,
}

/// What an answer to a gateway has besides: clients never see private lines.
pub(super) struct Inside {
    /// The attempt's number.
    pub(super) number: u32,
    /// What the worker made of the request; out once it runs.
    pub(super) meta: Option<Meta>,
}

/// Where an answer begins.
pub(super) struct Start {
    /// What each choice has said.
    pub(super) output: Output,
    /// Tokens of all prompts, for the usage.
    pub(super) prompt_tokens: u32,
    /// For each choice whether its client has tokens of it, and with them its first event.
    pub(super) begun: Vec<bool>,
    /// Set where tokens are told with how likely they were.
    pub(super) telling: Option<Telling>,
    /// What an earlier attempt said of its cache: the usage repeats it.
    pub(super) cached: Option<u32>,
}

/// The answer. Dropping it ends its account, and gives its admission back.
pub(super) struct Answer {
    events: Parts,
    form: Form,
    inside: Option<Inside>,
    start: Start,
    /// Token lines of an answer that is not streamed. Its client sees nothing before the end, so they go out together: at
    /// once the first, the others each second, or when there are many, or when something else is said.
    held: Vec<Line>,
    /// Tokens of the prompt that the cache had as the request began to run.
    found: u32,
    state: State,
    /// Something was said since the ticker's last turn.
    spoke: bool,
    /// The engine's turns at the ticker's last turn.
    turns: u64,
    /// The last events of choices that were cancelled: they go out together with the end, so that a gateway has them all
    /// or none.
    ending: Vec<Bytes>,
    account: Account,
    _admission: Admission,
}

impl Answer {
    /// Begins.
    pub(super) fn new(
        events: Parts,
        admission: Admission,
        account: Account,
        form: Form,
        inside: Option<Inside>,
        start: Start,
    ) -> Self {
        Answer {
            events,
            form,
            inside,
            start,
            held: Vec::new(),
            found: 0,
            state: State::Waiting,
            spoke: false,
            turns: account.model.engine.turns(),
            ending: Vec::new(),
            account,
            _admission: admission,
        }
    }

    fn fold(&mut self, choice: u32, said: &Said) {
        if let Form::Whole(folder) = &mut self.form {
            said.parts.iter().for_each(|part| folder.part(choice, part));
            if let Some(finish) = said.finish {
                folder.finish(choice, finish);
            }
        }
    }

    /// Begins a choice, unless it has begun: the client of a resume may have its first event already.
    fn begin(&mut self, choice: u32) -> Option<Bytes> {
        let begun = self.start.begun.get_mut(choice as usize)?;
        if std::mem::replace(begun, true) {
            return None;
        }
        let echoed = self.start.telling.as_ref().map(|telling| telling.echoed(choice));
        match &mut self.form {
            Form::Stream(encoder) => encoder.begin(choice, self.start.output.plain(), echoed),
            Form::Whole(fold) => {
                fold.score(choice, echoed.unwrap_or_default());
                None
            }
        }
    }

    fn token(&mut self, choice: u32, index: u32, id: u32, said: &Said, score: Option<&Score>) -> Option<Bytes> {
        self.state = State::Flowing;
        self.spoke = true;
        let mut public = Vec::with_capacity(3);
        public.extend(self.begin(choice));
        self.fold(choice, said);
        let told = self.start.telling.as_mut().and_then(|telling| telling.said(choice, id, score));
        let told = told.as_ref().map(std::slice::from_ref);
        if let (Form::Whole(fold), Some(told)) = (&mut self.form, told) {
            fold.score(choice, told);
        }
        if let Form::Stream(encoder) = &self.form {
            // With its score a token has an event of its own at once, maybe without text: then what is told is a
            // function of the ids alone.
            public.extend(encoder.parts(choice, &said.parts, told));
            if let Some(finish) = said.finish {
                public.push(encoder.finish(choice, finish));
            }
        }
        let private = self.inside.as_ref().map(|inside| Line::Tokens {
            attempt: inside.number,
            choice,
            index,
            ids: vec![id],
            finish: said.finish,
            reasoning: said.reasoning,
        });
        match (private, &self.form) {
            (Some(line), Form::Whole(_)) => self.hold(line),
            (private, _) => {
                (private.is_some() || !public.is_empty()).then(|| with_private(private.as_slice(), &public))
            }
        }
    }

    /// Holds a token line back, joined to the one before where it goes on from it; returns what is due.
    fn hold(&mut self, line: Line) -> Option<Bytes> {
        match (self.held.last_mut(), line) {
            (
                Some(Line::Tokens { choice, index, ids, finish, reasoning, .. }),
                Line::Tokens { choice: of, index: at, ids: more, finish: end, reasoning: so_far, .. },
            ) if *choice == of && finish.is_none() && *index + ids.len() as u32 == at => {
                ids.extend(more);
                (*finish, *reasoning) = (end, so_far);
            }
            (_, line) => self.held.push(line),
        }
        let ids = |line: &Line| if let Line::Tokens { ids, .. } = line { ids.len() } else { 0 };
        let due = self.account.tokens == 1 || self.held.iter().map(ids).sum::<usize>() >= HELD_MAX;
        due.then(|| with_private(&std::mem::take(&mut self.held), &[]))
    }

    /// Makes an event of a line and of what was held back before it.
    fn with_held(&mut self, line: Line) -> Bytes {
        self.held.push(line);
        with_private(&std::mem::take(&mut self.held), &[])
    }

    /// Takes the end of a choice that was cancelled.
    fn stopped(&mut self, choice: u32, text: &str) {
        let Some(said) = self.start.output.stopped(choice, text) else { return };
        let begun = self.begin(choice);
        self.ending.extend(begun);
        self.fold(choice, &said);
        match &mut self.form {
            Form::Stream(encoder) => {
                self.ending.extend(encoder.parts(choice, &said.parts, None));
                self.ending.push(encoder.cancelled(choice));
            }
            Form::Whole(fold) => fold.cancelled(choice),
        }
    }

    /// Ends an answer that was cancelled: with what there is, where that is something.
    fn cut(&mut self, cached: u32) -> Result<Option<Bytes>, Error> {
        let divisible = !matches!(&self.form, Form::Whole(fold) if !fold.divisible());
        if !divisible || self.start.output.tokens() == 0 {
            return Err(self.ended(cancelled()));
        }
        // Of prompts that never came to the engine nobody else tells.
        (0..self.start.begun.len() as u32).for_each(|choice| self.stopped(choice, ""));
        self.account.outcome = Some(Code::Cancelled.row().code);
        Ok(Some(self.done(cached)))
    }

    /// `cached` is what this attempt says of its cache; an earlier attempt's word on it wins.
    fn done(&mut self, cached: u32) -> Bytes {
        self.state = State::Over;
        // A resume that had nothing left to generate ends without a token of its own.
        self.account.outcome.get_or_insert("stop");
        let usage = wire::Usage {
            prompt: self.start.prompt_tokens,
            completion: self.start.output.tokens(),
            cached: self.start.cached.unwrap_or(cached),
            reasoning: self.start.output.reasoning_tokens(),
        };
        for choice in 0..self.start.begun.len() as u32 {
            self.begin(choice);
        }
        let usage_line = self.inside.as_ref().map(|_| Line::Usage(usage));
        let private: Vec<Line> = self.held.drain(..).chain(usage_line).collect();
        let public = match &self.form {
            Form::Stream(encoder) => {
                let done = Bytes::from_static(DONE_EVENT);
                self.ending.drain(..).chain(encoder.usage(usage)).chain([done]).collect()
            }
            Form::Whole(folder) => {
                let json = folder.done(usage);
                vec![if self.inside.is_some() { data_event(&json) } else { json.into() }]
            }
        };
        with_private(&private, &public)
    }
}

impl Making for Answer {
    type News = Message;

    async fn news(&mut self) -> Option<Message> {
        self.events.recv().await
    }

    /// Turns one message into bytes, if it makes any.
    fn take(&mut self, message: Option<Message>) -> Result<Option<Bytes>, Error> {
        let event = match message {
            Some(Message::Event(event)) => event,
            Some(Message::Refused(error)) => return Err(self.ended(error)),
            None => return Err(self.ended(self.account.model.engine.ended())),
        };
        match event {
            EventKind::Started { cached } => {
                // A request that made room for others starts again; it is no longer news.
                self.account.begun.get_or_insert(self.account.plane.clock.now());
                let meta = self.inside.as_mut().and_then(|inside| inside.meta.take());
                self.found = cached as u32;
                let cached = self.start.cached.unwrap_or(self.found);
                Ok(meta.map(|meta| Line::Meta(MetaText::from(&Meta { cached, ..meta })).event()))
            }
            EventKind::Resumed { choice, text, finish } => {
                let said = self.start.output.resumed(choice, &text, finish);
                self.fold(choice, &said);
                Ok(None)
            }
            EventKind::Scored { choice, position, id, score } => {
                let telling = self.start.telling.as_mut();
                let told = telling.and_then(|telling| telling.scored(choice, position, id, &score));
                if let (Form::Whole(_), Some(_)) = (&self.form, &told) {
                    self.begin(choice);
                }
                if let (Form::Whole(fold), Some(told)) = (&mut self.form, told) {
                    fold.score(choice, &[told]);
                }
                Ok(None)
            }
            EventKind::Embedded { choice, vector } => {
                if let Form::Whole(fold) = &mut self.form {
                    fold.embedded(choice, &vector);
                }
                Ok(None)
            }
            EventKind::Token { choice, index, id, text, finish, score } => {
                // What comes after the end that a choice's own words made is nobody's.
                let Some(said) = self.start.output.token(choice, id, &text, finish) else { return Ok(None) };
                self.account.token();
                self.account.outcome = said.finish.or(self.account.outcome);
                Ok(self.token(choice, index, id, &said, score.as_deref()))
            }
            EventKind::Stopped { choice, text } => {
                self.stopped(choice, &text);
                Ok(None)
            }
            EventKind::Done(usage) if self.account.cancelled.is_some() => self.cut(usage.cached_tokens as u32),
            EventKind::Done(usage) => Ok(Some(self.done(usage.cached_tokens as u32))),
            EventKind::Failed(code, message) => Err(self.ended(Error::new(code, message))),
        }
    }

    /// Ends an answer of which every choice is over by its own words, though its scheduler knows nothing of that.
    fn early_end(&mut self) -> Option<Bytes> {
        let over = !matches!(self.state, State::Over) && self.start.output.cut_short();
        over.then(|| self.done(self.found))
    }

    fn over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    fn cancelled(&mut self, reason: Reason) {
        self.account.cancelled = Some(reason);
        self.events.stop();
    }

    fn offered(&mut self) -> Option<Bytes> {
        Some(self.with_held(Line::Offer))
    }

    /// Shows life while nothing else does. To a gateway only as long as the engine makes its turns: it judges this
    /// worker by them.
    fn sign_of_life(&mut self) -> Option<Bytes> {
        let turns = self.account.model.engine.turns();
        let alive = std::mem::replace(&mut self.turns, turns) != turns;
        if !self.held.is_empty() {
            return Some(with_private(&std::mem::take(&mut self.held), &[]));
        }
        if std::mem::take(&mut self.spoke) {
            return None;
        }
        match (&self.state, &self.inside) {
            (State::Waiting | State::Flowing, Some(_)) if alive => Some(self.account.progress()),
            // A gateway keeps its clients alive by itself; a direct client needs it from us.
            (State::Waiting, None) => Some(Bytes::from_static(KEEP_ALIVE_EVENT)),
            _ => None,
        }
    }

    fn ended(&mut self, error: Error) -> Error {
        self.state = State::Over;
        self.account.outcome = Some(error.code().row().code);
        error
    }

    /// Turns a failure into the last bytes: a private refusal for a gateway, an error event for a client.
    fn fail(&mut self, error: &Error) -> Bytes {
        super::errors::log(error);
        match self.inside {
            Some(_) => self.with_held(Line::Refusal(error.into())),
            None => error_event(error),
        }
    }
}
