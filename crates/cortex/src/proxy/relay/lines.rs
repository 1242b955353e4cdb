//! What a worker says of a request in private lines, and what of it is kept.

use fleet::Origin;
use wire::private::{Line, Meta, MetaText};
use words::{Code, Error, Moment};

use super::Relay;

impl Relay {
    pub(super) fn read_lines(&mut self, now: Moment) -> Result<(), Error> {
        let mut lines = std::mem::take(&mut self.lines);
        for line in lines.drain(..) {
            match line {
                Line::Tokens { attempt, choice, index, ids, finish, reasoning } => {
                    let accepted = self.journey.accept(attempt, choice, index, &ids, finish.is_some());
                    accepted.map_err(|error| {
                        Error::new(Code::UpstreamFailed, "the worker's tokens are out of turn").because(error)
                    })?;
                    self.note_tokens(now, ids.len() as u64);
                    if let Some(tokens) = self.reasoning.get_mut(choice as usize) {
                        *tokens = reasoning;
                    }
                }
                Line::Usage(_) => self.complete = true,
                Line::Refusal(refusal) => return Err(refusal.into()),
                Line::Meta(meta) => self.note_meta(meta)?,
                Line::Offer => self.offered = Some(now),
                Line::Progress(_) => self.journey.queued(),
                Line::Words(tokens) => {
                    self.journey.bind();
                    if tokens > 0 {
                        self.note_tokens(now, u64::from(tokens));
                    }
                }
                Line::More => {}
            }
        }
        self.lines = lines;
        Ok(())
    }

    /// The first attempt's word on the request binds all later ones that go on from its tokens.
    fn note_meta(&mut self, text: MetaText) -> Result<(), Error> {
        if !self.journey.begun() {
            self.journey.runs();
            self.unread = Some(text);
            return Ok(());
        }
        self.read_meta();
        text.read().map_or(Ok(()), |meta| self.journey.began(origin(&meta)))
    }

    /// Reads what the first attempt made of the request, before somebody asks for it.
    pub(super) fn read_meta(&mut self) {
        if let Some(meta) = self.unread.take().and_then(|text| text.read()) {
            self.journey.originates(origin(&meta));
            self.meta = Some(Box::new(meta));
        }
    }

    pub(super) fn note_tokens(&mut self, now: Moment, count: u64) {
        let (model, metrics) = (self.order.model.as_str(), &self.proxy.metrics);
        self.place.flight.tokens(count);
        self.tokens.get_or_insert_with(|| metrics.tokens.with_label_values(&[model])).inc_by(count);
        if self.first_token.is_none() {
            self.first_token = Some(now);
            metrics.first_token.with_label_values(&[model]).observe(now.since(self.arrived).as_secs_f64());
        } else if self.prefill.take().is_some() {
            let gap = now.since(self.last_token).as_secs_f64();
            metrics.gap.with_label_values(&[model]).observe(gap);
        }
        self.last_token = now;
    }
}

fn origin(meta: &Meta) -> Origin {
    Origin {
        prompt_hash: meta.prompt_hash,
        continue_fingerprint: meta.continue_fingerprint,
        exact_fingerprint: meta.exact_fingerprint,
    }
}
