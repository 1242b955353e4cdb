//! Who waits for a model's load or its end, and in what words each is told.

use std::collections::BTreeMap;

use lifecycle::{Caller, ModelAnswer};
use tokio::sync::oneshot;
use words::{Code, Error, ModelId};

use super::load;
use crate::harness::LoadFailure;

/// Where somebody who wants a load hears of its end.
pub(super) type LoadReply = oneshot::Sender<Result<(), LoadFailure>>;
/// Where somebody who wants a model gone hears of it, and how many requests were cut.
pub(super) type LeaveReply = oneshot::Sender<Result<usize, Error>>;

/// Where a caller waits.
pub(super) enum Reply {
    Load(LoadReply),
    Leave(LeaveReply),
}

/// All callers of one model that wait.
#[derive(Default)]
pub(super) struct Replies {
    waiting: BTreeMap<Caller, Reply>,
    last: u64,
}

impl Replies {
    /// Enters a caller; one without a reply waits for nothing.
    pub(super) fn enter(&mut self, reply: Option<Reply>) -> Caller {
        self.last += 1;
        let caller = Caller(self.last);
        if let Some(reply) = reply {
            self.waiting.insert(caller, reply);
        }
        caller
    }

    /// Tells a caller, who may be gone. `failure` is why the last load failed, `cut` how many requests were cut.
    pub(super) fn tell(
        &mut self,
        id: &ModelId,
        caller: Caller,
        answer: ModelAnswer,
        failure: Option<&LoadFailure>,
        cut: usize,
    ) {
        match self.waiting.remove(&caller) {
            Some(Reply::Load(reply)) => drop(reply.send(loaded(id, answer, failure))),
            Some(Reply::Leave(reply)) => drop(reply.send(left(id, answer, cut))),
            None => {}
        }
    }
}

fn loaded(id: &ModelId, answer: ModelAnswer, failure: Option<&LoadFailure>) -> Result<(), LoadFailure> {
    let error = match answer {
        ModelAnswer::Ready => return Ok(()),
        ModelAnswer::Busy => {
            let message = format!("the model '{id}' is being unloaded; load it again afterwards");
            Error::new(Code::Conflict, message)
        }
        ModelAnswer::TooMany => Error::new(Code::Overloaded, "too many wait for this model"),
        ModelAnswer::Failed => match failure {
            Some(failure) => return Err(copy(failure)),
            None => Error::internal("a load failed without a reason"),
        },
        ModelAnswer::Cancelled | ModelAnswer::Gone | ModelAnswer::NotHere => load::cancelled(),
    };
    Err(error.into())
}

fn left(id: &ModelId, answer: ModelAnswer, cut: usize) -> Result<usize, Error> {
    match answer {
        ModelAnswer::NotHere => {
            let message = format!("the model '{id}' is not on this worker");
            Err(Error::new(Code::ModelNotHere, message).at("model_id"))
        }
        ModelAnswer::TooMany => Err(Error::new(Code::Overloaded, "too many wait for this model")),
        _ => Ok(cut),
    }
}

/// Copies a failure for one more caller, but for its source, which is logged.
fn copy(failure: &LoadFailure) -> LoadFailure {
    let error = Error::new(failure.error.code(), failure.error.message());
    let error = match failure.error.param() {
        Some(param) => error.at(param),
        None => error,
    };
    LoadFailure { error, transient: failure.transient }
}
