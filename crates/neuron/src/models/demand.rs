//! Requests for models: each gets its place inside, waits for its model's load, or begins it.

use tokio::time::{Instant, timeout_at};
use wire::Peek;
use words::{Code, Error, ModelId, ModelState, Retry};

use super::door::Waiting;
use super::owner::{Message, Order};
use super::{Handle, InUse, Models, closed};
use crate::activation::spec_of;
use crate::harness::LoadFailure;

/// How often a request whose model went, as it came, begins again.
const AGAIN_MAX: usize = 8;
/// A model whose load failed is not loaded for a request again before this, in seconds.
const FAILED_S: u64 = 5;

impl Models {
    /// Gives a request its place in a model, by its name or another that it has. One that is absent and stands in the
    /// catalogue is loaded for it; one that is on its way is waited for, at most `data.load_wait_s`.
    ///
    /// # Errors
    /// `ModelNotHere` when it is absent for good or has failed, `ModelLoading` when it did not come in time, `Draining` while
    /// it goes; `InsufficientMemory` with the numbers when it does not fit, or found no room in time; `Overloaded` when as
    /// many wait for it as its queue would hold.
    pub(crate) async fn attach(&self, name: &ModelId) -> Result<InUse, Error> {
        let id = self.resolve(name);
        let handle = self.known(&id)?;
        let options = &self.inner.parts.options;
        let (clock, metrics) = (self.inner.parts.clock, &self.inner.parts.metrics);
        let (begun, until) = (clock.now(), Instant::now() + options.data.load_wait());
        let most = options.scheduler.max_running + options.scheduler.max_waiting;
        for _ in 0..AGAIN_MAX {
            let mut waiting = match handle.door.enter(most) {
                Some(Ok(inside)) => return Ok(inside),
                Some(Err(waiting)) => waiting,
                None => return Err(Error::new(Code::Overloaded, "as many wait for the model as its queue holds")),
            };
            self.may_wait(&id, &handle)?;
            match timeout_at(until, self.come(&id, &handle, &mut waiting)).await {
                Ok(Ok(Some(inside))) => {
                    metrics.waited_for_load(id.as_str(), clock.now().since(begun).as_secs_f64());
                    return Ok(inside);
                }
                // It went as it came: once more from the start.
                Ok(Ok(None)) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(self.not_in_time(&id, &handle).await),
            }
        }
        Err(Error::new(Code::Overloaded, format!("the model '{id}' comes and goes; try again shortly")))
    }

    /// Returns the model of an external engine that a request's body names; `None` for one of this process.
    ///
    /// # Errors
    /// `InvalidRequest` for a body that names no model.
    pub(crate) fn external(&self, body: &[u8]) -> Result<Option<ModelId>, Error> {
        if !self.inner.has_external {
            return Ok(None);
        }
        let name = Peek::parse(body)?.model_id()?;
        let entry = self.inner.entry(&self.resolve(&name)).map(|(entry, _)| entry.is_external());
        Ok(Some(name).filter(|_| entry == Some(true)))
    }

    fn known(&self, id: &ModelId) -> Result<Handle, Error> {
        let here = |handle: &Handle| handle.view.borrow().status.state != ModelState::Absent;
        self.handle(id).filter(|handle| here(handle) || self.inner.on_demand(id)).ok_or_else(|| {
            let message = format!("the model '{id}' is not on this worker; GET /v1/models lists those that are");
            Error::new(Code::ModelNotHere, message).at("model")
        })
    }

    /// Refuses at once where waiting is no use.
    fn may_wait(&self, id: &ModelId, handle: &Handle) -> Result<(), Error> {
        if !self.inner.is_open() {
            return Err(closed());
        }
        let (state, failed_at) = {
            let view = handle.view.borrow();
            (view.status.state, view.failed_at)
        };
        let listed = self.inner.on_demand(id);
        let failed = || failed_at.is_some_and(|at| self.inner.parts.clock.now().since(at).as_secs() < FAILED_S);
        let not_here = |message: String| Err(Error::new(Code::ModelNotHere, message).at("model"));
        match state {
            ModelState::Absent if !listed => not_here(format!("the model '{id}' is not loaded on this worker")),
            ModelState::Failed if !listed || failed() => {
                not_here(format!("the model '{id}' failed to load on this worker"))
            }
            ModelState::Unloading if listed => Ok(()),
            ModelState::Draining | ModelState::Unloading => {
                Err(Error::new(Code::Draining, format!("the model '{id}' is being unloaded")))
            }
            _ => Ok(()),
        }
    }

    /// Waits for the model to come, and sees to it that it does. `None` when it went again meanwhile.
    async fn come(&self, id: &ModelId, handle: &Handle, waiting: &mut Waiting) -> Result<Option<InUse>, Error> {
        let mut open = self.inner.open.subscribe();
        let shut = async move {
            if open.wait_for(|open| !*open).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            inside = waiting.opened() => Ok(Some(inside)),
            () = shut => Err(closed()),
            loaded = self.load_for(id, handle) => match loaded {
                // It is open, or was and will be again.
                Ok(()) => Ok(None),
                Err(LoadFailure { error, .. }) => Err(refusal(id, error)),
            },
        }
    }

    /// Begins or joins the load, and waits for its end; where it serves and lets nobody in for now, until it has gone.
    async fn load_for(&self, id: &ModelId, handle: &Handle) -> Result<(), LoadFailure> {
        let mut view = handle.view.clone();
        // One that serves lets nobody in only to make room for another: its next load is this request's.
        let _ = view.wait_for(|view| view.status.state != ModelState::Ready).await;
        let spec = match self.inner.entry(id) {
            Some((entry, true)) => spec_of(entry)?,
            // It is on its way by somebody else's order.
            _ => {
                let _ = view.wait_for(|view| settled(view.status.state)).await;
                return Ok(());
            }
        };
        let (reply, answer) = tokio::sync::oneshot::channel();
        let order = Order { spec, make_room: true, even_closed: false };
        let gone = || Error::internal("a model's owner is gone");
        handle.inbox.send(Message::Load(Box::new(order), reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Says why a load did not end in time.
    async fn not_in_time(&self, id: &ModelId, handle: &Handle) -> Error {
        let (need, loading) = {
            let view = handle.view.borrow();
            (view.need, view.loading(self.inner.parts.clock.now()))
        };
        if need > 0
            && let Some(words) = self.inner.memory.explain(id, need).await
        {
            return Error::new(Code::InsufficientMemory, words);
        }
        Error::new(Code::ModelLoading, format!("the model '{id}' is still loading")).while_loading(loading)
    }
}

fn settled(state: ModelState) -> bool {
    matches!(state, ModelState::Ready | ModelState::Failed | ModelState::Absent)
}

/// Says to a request what a failed load means to it: a fault of this worker's files or settings is none of the request's.
fn refusal(id: &ModelId, error: Error) -> Error {
    match error.code() {
        Code::Conflict => Error::new(Code::Draining, format!("the model '{id}' was unloaded as it was loading")),
        code if code.row().retry == Retry::Never => {
            let message = format!("the model '{id}' failed to load on this worker: {}", error.message());
            Error::new(Code::ModelNotHere, message).at("model")
        }
        _ => error,
    }
}
