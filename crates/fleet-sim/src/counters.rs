//! How often each thing happened: faults, transitions, endings. A counter that stays at zero over many seeds is a
//! part of the simulation that does not work.

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)*) => {
        /// What is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Count { $($(#[$doc])* $name,)* }

        impl Count {
            /// Everything that is counted, in order.
            pub const ALL: &'static [Count] = &[$(Count::$name,)*];

            /// Returns its name, as reports show it.
            pub fn name(self) -> &'static str {
                match self { $(Count::$name => $text,)* }
            }
        }
    };
}

counts! {
    /// A request came to a gateway.
    Request => "requests",
    /// A request with several choices.
    SeveralChoices => "requests with several choices",
    /// A request with stop strings.
    StopStrings => "requests with stop strings",
    /// A request that ended with all that was asked for.
    Done => "requests done",
    /// A request that ended by its client.
    Left => "clients left",
    /// A request that ended with an error.
    Failed => "requests failed",
    /// A request that an operator cancelled.
    Cancelled => "requests cancelled",
    /// A request that was cancelled at a node, where it waited for its model.
    CancelledWaiting => "requests cancelled before their model came",
    /// A request that ended with what it had when it was cancelled.
    CutShort => "requests ended by their cancelling",
    /// A request whose gateway died; an honest failure of the client's own connection.
    GatewayDied => "requests whose gateway died",
    /// An attempt was opened on a node.
    Attempt => "attempts",
    /// An attempt was opened on a node of the version before.
    OldNode => "attempts on nodes of the version before",
    /// A request came to a gateway of the version before.
    OldGateway => "requests to gateways of the version before",
    /// A request was tried elsewhere before its first token.
    Retry => "retries before the first token",
    /// A stream went on elsewhere after its first token.
    Continuation => "continuations",
    /// A gateway completed an answer by itself.
    CompletedLocally => "answers completed by the gateway",
    /// A gateway took the offer of a leaving node.
    HandedOver => "streams handed over",
    /// A request waited for a route.
    RouteWait => "waits for a route",
    /// Tokens of an old attempt, or out of turn, were refused.
    FenceRefused => "events of old attempts refused",
    /// An attempt was given up because it stood still.
    Stalled => "attempts given up as stalled",
    /// An attempt was given up because its node was out of reach.
    Unreachable => "attempts given up as unreachable",
    /// A node refused an attempt.
    Refused => "attempts refused by a node",
    /// Tokens that clients got.
    Token => "tokens",
    /// A status that was older than what its gateway knew.
    StaleStatus => "stale statuses",
    /// A node lost a gateway's session and cancelled its requests.
    Orphaned => "requests orphaned",
    /// A sequence was paused for its reader.
    Paused => "sequences paused",
    /// An order reached a node that took it.
    OrderTaken => "orders taken",
    /// A node refused an order.
    OrderRefused => "orders refused",
    /// A node could not record an order, and refused it.
    OrderUnrecorded => "orders refused for a full disk",
    /// A node was told to stop by a signal.
    Signal => "signals",
    /// A node became ready.
    Ready => "nodes ready",
    /// A node came up held.
    Held => "nodes held",
    /// A node was cordoned.
    Cordoned => "nodes cordoned",
    /// A node began to drain.
    Settle => "drains: settle",
    /// A node closed.
    Closed => "drains: closed",
    /// A node began to hand streams over.
    Handoff => "drains: hand-over",
    /// A node cut what still ran.
    Cut => "drains: force",
    /// A node was empty and alive.
    Drained => "nodes drained",
    /// A node unloaded everything.
    Unloading => "nodes unloading",
    /// A node ended by itself.
    CleanExit => "nodes exited",
    /// A node offered a stream to others.
    Offered => "streams offered",
    /// A node ran its own canary.
    OwnCanary => "canaries run by nodes",
    /// A node ran an upgrade.
    Upgrade => "upgrades",
    /// A rollout was begun.
    Rollout => "rollouts",
    /// A rollout would have let a model go dark, or could not end, and was refused.
    RolloutRefused => "rollouts refused",
    /// A rollout took a step.
    RolloutStep => "rollout steps",
    /// A rollout paused with a reason.
    RolloutPaused => "rollouts paused",
    /// An operator resumed a rollout.
    RolloutResumed => "rollouts resumed",
    /// A rollout restarted all its nodes.
    RolloutDone => "rollouts done",
    /// A rollout was ended before.
    RolloutAborted => "rollouts aborted",
    /// A gateway became the coordinator.
    LeaseTaken => "leases taken",
    /// A coordinator's canary was answered.
    Canary => "canaries answered",
    /// A swap of the store came too late.
    SwapRefused => "swaps refused",
    /// An upgrade left a node that answers wrongly.
    BadUpgrade => "fault: bad upgrade",
    /// The store could not be used for a while.
    StoreDown => "fault: store down",
    /// A node crashed.
    NodeCrash => "fault: node crashed",
    /// A node's machine went away without a word.
    NodeVanish => "fault: node vanished",
    /// A node stood still.
    NodePause => "fault: node stopped for a while",
    /// A node's clock jumped.
    ClockJump => "fault: clock jumped",
    /// A gateway crashed.
    GatewayCrash => "fault: gateway crashed",
    /// A gateway's machine went away without a word.
    GatewayVanish => "fault: gateway vanished",
    /// A gateway stood still.
    GatewayPause => "fault: gateway stopped for a while",
    /// A link went deaf in one direction.
    OneWayPartition => "fault: one-way partition",
    /// A link went deaf in both directions.
    TwoWayPartition => "fault: two-way partition",
    /// A connection broke.
    ConnectionDrop => "fault: connection dropped",
    /// A control message came late, beside the others.
    LateControl => "fault: late control message",
    /// A control message came twice.
    DuplicateControl => "fault: duplicate control message",
    /// An event of an answer came twice.
    Echo => "fault: event of an answer came twice",
    /// A connection broke after an answer's last token.
    LostEnd => "fault: the end of an answer was lost",
    /// A node's disk was full for a while.
    DiskFull => "fault: disk full",
    /// A node died right after it wrote its record.
    CrashPoint => "fault: node died between an act and the next",
    /// An order came again, long after.
    StaleOrder => "fault: stale order",
    /// An engine's device failed.
    DeviceFault => "fault: device failed a step",
    /// An engine's step hung.
    EngineHang => "fault: engine hung",
    /// A load failed.
    LoadFailure => "fault: load failed",
    /// A request waited at a node for its model.
    WaitedForLoad => "requests that waited for their model",
    /// A request was told that its model did not come in its time.
    LoadTooLate => "requests whose model did not come in time",
    /// A gateway sent a request to a node that had to load its model.
    Placed => "requests placed",
    /// A model made room for another one.
    Evicted => "models evicted",
    /// A model let nobody in, so that another one finds room.
    Shut => "models that let nobody in for another's sake",
    /// A model went, because nobody had asked for it for long.
    TtlOver => "models that nobody asked for",
    /// A load was over.
    Loaded => "models loaded",
    /// A model was unloaded.
    Unloaded => "models unloaded",
}

/// The counts of one run, or of many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters([u64; Count::ALL.len()]);

impl Default for Counters {
    fn default() -> Self {
        Counters([0; Count::ALL.len()])
    }
}

impl Counters {
    /// Counts one.
    pub(crate) fn add(&mut self, count: Count) {
        self.0[count as usize] += 1;
    }

    /// Returns how often it happened.
    pub fn of(&self, count: Count) -> u64 {
        self.0[count as usize]
    }

    /// Adds the counts of another run.
    pub fn merge(&mut self, other: &Counters) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }

    /// Names what never happened.
    pub fn never(&self) -> Vec<&'static str> {
        Count::ALL.iter().filter(|count| self.of(**count) == 0).map(|count| count.name()).collect()
    }
}
