//! Bugs to be found, behind the feature `planted`: each undoes one decision where the simulation applies it. The machines
//! themselves stay whole, so that no program has a line of this.

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// A node closes before its gateways know.
    SkipSettle,
    /// A gateway passes on what the fence refuses.
    DropFence,
    /// A node takes orders whatever epoch they saw.
    IgnoreEpochs,
    /// A coordinator releases a node's permit as soon as its process starts.
    PermitOnStart,
    /// A coordinator counts on what nodes said before they fell silent.
    StaleCapacity,
    /// A closing node forgets its queue.
    ForgetQueued,
    /// A coordinator restarts the last replica.
    RestartLast,
    /// A node lets requests in after it closed.
    AcceptAfterClosed,
    /// A gateway continues an answer before its last token.
    WrongIndex,
    /// The end of a gateway's old session releases its new one.
    DoubleRelease,
    /// A node gives the memory of a model away before that has gone.
    Overcommit,
    /// A node does not look at the time of those who wait for a model.
    WaitForEver,
    /// A node does not tell an engine that a request was cancelled.
    DeafToCancel,
    /// A gateway waits for ever for a node to end what was cancelled.
    KeepCancelled,
}

impl Planted {
    /// All of them.
    pub const ALL: [Planted; 14] = [
        Planted::SkipSettle,
        Planted::DropFence,
        Planted::IgnoreEpochs,
        Planted::PermitOnStart,
        Planted::StaleCapacity,
        Planted::ForgetQueued,
        Planted::RestartLast,
        Planted::AcceptAfterClosed,
        Planted::WrongIndex,
        Planted::DoubleRelease,
        Planted::Overcommit,
        Planted::WaitForEver,
        Planted::DeafToCancel,
        Planted::KeepCancelled,
    ];
}
