//! A whole fleet in this process, with a knife in the wires between gateway and workers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use service::lanes::Lanes;
use service::notify::Notifier;
use service::signals::Signal;
use service::traces::TraceSettings;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::free_port;

/// Where the worker's stream is cut: at the start of the mark of that number, and so many bytes later. Marks are the
/// private lines of tokens and usage, and the end event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The mark, from 0.
    pub mark: usize,
    /// Bytes of it and after it that still come through.
    pub bytes: usize,
    /// Whether the wire then hangs, and nothing tells so, or breaks.
    pub hangs: bool,
}

const MARKS: [&[u8]; 3] = [b":cx t ", b":cx u ", b"[DONE]"];
const MARK_BYTES: usize = 6;

/// Cuts streams, one after another, as it was told.
#[derive(Debug, Default)]
pub struct Knife {
    cuts: VecDeque<Cut>,
    seen: usize,
    /// Bytes until the cut, once its mark was seen.
    left: Option<usize>,
    tail: Vec<u8>,
    made: usize,
}

impl Knife {
    /// Takes new orders: each cut hits the attempt after the one that the cut before it hit.
    pub fn arm(&mut self, cuts: impl IntoIterator<Item = Cut>) {
        *self = Knife { cuts: cuts.into_iter().collect(), ..Knife::default() };
    }

    /// Returns how many cuts were made since the last orders.
    pub fn made(&self) -> usize {
        self.made
    }

    /// Returns how many bytes of the chunk come through, and the cut that is made then.
    fn pass(&mut self, chunk: &[u8]) -> (usize, Option<Cut>) {
        let Some(cut) = self.cuts.front().copied() else { return (chunk.len(), None) };
        let old = self.tail.len();
        let bytes = [std::mem::take(&mut self.tail).as_slice(), chunk].concat();
        if self.left.is_none() {
            let mut at = 0;
            while at + MARK_BYTES <= bytes.len() && self.left.is_none() {
                if MARKS.contains(&&bytes[at..at + MARK_BYTES]) {
                    if self.seen == cut.mark {
                        // What was passed before of this mark can't be called back.
                        self.left = Some((at + cut.bytes).saturating_sub(old));
                    }
                    self.seen += 1;
                }
                at += 1;
            }
        }
        match self.left {
            Some(left) if left <= chunk.len() => {
                self.cuts.pop_front();
                (self.seen, self.left, self.made) = (0, None, self.made + 1);
                (left, Some(cut))
            }
            Some(left) => {
                self.left = Some(left - chunk.len());
                (chunk.len(), None)
            }
            None => {
                self.tail = bytes[bytes.len().saturating_sub(MARK_BYTES - 1)..].to_vec();
                (chunk.len(), None)
            }
        }
    }
}

/// A gateway and its workers as tasks of this process.
pub struct Rig {
    /// `http://host:port` of the API.
    pub api: String,
    /// `http://host:port` of the admin port.
    pub admin: String,
    /// What lies in every wire from a worker.
    pub knife: Arc<Mutex<Knife>>,
    tasks: Vec<JoinHandle<()>>,
    _wires: Vec<Wire>,
    _signals: Vec<mpsc::Sender<Signal>>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// A place in which connections to a worker can be cut.
#[derive(Debug)]
pub struct Wire {
    /// Where the gateway connects to.
    pub address: String,
    task: JoinHandle<()>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Wire {
    /// Opens a wire to a worker's data address, with a knife in it.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn to(worker: String, knife: Arc<Mutex<Knife>>) -> Result<Wire> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        Ok(Wire { address, task: tokio::spawn(cut_wire(listener, worker, knife)) })
    }
}

fn surrounded<T>(sides: &mut Vec<mpsc::Sender<Signal>>, make: impl FnOnce(mpsc::Receiver<Signal>) -> T) -> T {
    let (sender, receiver) = mpsc::channel(4);
    sides.push(sender);
    make(receiver)
}

impl Rig {
    /// Starts workers and a gateway over them; waits until it serves.
    ///
    /// # Errors
    /// When no port is free, or nothing serves in time.
    pub async fn start(workers: &[neuron::options::Options], mut gateway: cortex::options::Options) -> Result<Self> {
        let (mut tasks, mut wires, mut signals) = (Vec::new(), Vec::new(), Vec::new());
        let knife = Arc::new(Mutex::new(Knife::default()));
        gateway.neurons.clear();
        for (i, options) in workers.iter().enumerate() {
            let mut options = options.clone();
            let data = format!("127.0.0.1:{}", free_port()?);
            let wire = Wire::to(data.clone(), knife.clone()).await?;
            options.node.id = Some(format!("worker-{i}"));
            options.data.bind = data.parse()?;
            options.data.advertise = Some(wire.address.clone());
            wires.push(wire);
            let control = TcpListener::bind("127.0.0.1:0").await?;
            gateway.neurons.push(cortex::options::NeuronEntry { control: control.local_addr()?.to_string() });
            let around = surrounded(&mut signals, |signals| neuron::node::Surroundings {
                // Nothing here comes from a hub.
                hub: Default::default(),
                control,
                signals,
                notifier: Notifier::default(),
                traces: TraceSettings::default(),
                host_name: "rig".into(),
                hooks: Vec::new(),
                on_data_address: None,
            });
            tasks.push(tokio::spawn(async move {
                if let Err(error) = Box::pin(neuron::node::run(options, around)).await {
                    eprintln!("the worker ended: {error}");
                }
            }));
        }
        let (api, admin) = (TcpListener::bind("127.0.0.1:0").await?, TcpListener::bind("127.0.0.1:0").await?);
        let urls = (format!("http://{}", api.local_addr()?), format!("http://{}", admin.local_addr()?));
        let lanes = Lanes::start("rig", 2)?;
        let around = surrounded(&mut signals, |signals| cortex::gateway::Surroundings {
            admin,
            api,
            lanes,
            signals,
            notifier: Notifier::default(),
            traces: TraceSettings::default(),
        });
        tasks.push(tokio::spawn(async move {
            if let Err(error) = cortex::gateway::run(gateway, around).await {
                eprintln!("the gateway ended: {error}");
            }
        }));
        let rig = Rig { api: urls.0, admin: urls.1, knife, tasks, _wires: wires, _signals: signals };
        rig.until_routable(workers.len()).await?;
        Ok(rig)
    }

    async fn until_routable(&self, workers: usize) -> Result<()> {
        for _ in 0..600 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let Ok(response) = reqwest::get(format!("{}/api/status", self.admin)).await else { continue };
            let status: serde_json::Value = response.json().await.context("the status is no JSON")?;
            let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
            if status["ready"] == true && nodes.iter().filter(|node| node["routable"] == true).count() == workers {
                return Ok(());
            }
        }
        bail!("the fleet does not serve")
    }

    /// Arms the knife.
    pub fn arm(&self, cuts: impl IntoIterator<Item = Cut>) {
        self.knife.lock().unwrap_or_else(PoisonError::into_inner).arm(cuts);
    }

    /// Returns how many cuts were made since it was armed.
    pub fn cuts_made(&self) -> usize {
        self.knife.lock().unwrap_or_else(PoisonError::into_inner).made()
    }
}

/// Passes connections on to a worker, through the knife.
async fn cut_wire(listener: TcpListener, worker: String, knife: Arc<Mutex<Knife>>) {
    while let Ok((near, _)) = listener.accept().await {
        let (worker, knife) = (worker.clone(), knife.clone());
        tokio::spawn(async move {
            let Ok(far) = TcpStream::connect(worker).await else { return };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let ((mut from_near, mut to_near), (mut from_far, mut to_far)) = (near.into_split(), far.into_split());
            let up = tokio::spawn(async move { tokio::io::copy(&mut from_near, &mut to_far).await });
            let mut buffer = vec![0; 16 << 10];
            while let Ok(length @ 1..) = from_far.read(&mut buffer).await {
                let (pass, cut) = knife.lock().unwrap_or_else(PoisonError::into_inner).pass(&buffer[..length]);
                if to_near.write_all(&buffer[..pass]).await.is_err() {
                    break;
                }
                match cut {
                    // Until the gateway gives the connection up.
                    Some(cut) if cut.hangs => {
                        let _ = up.await;
                        return;
                    }
                    Some(_) => break,
                    None => {}
                }
            }
            up.abort();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_knife_cuts_at_its_mark_in_any_chunking() {
        let stream = b"x\n\n:cx t 1 0 0 5 -\ndata: a\n\n:cx t 1 0 1 6 -\ndata: b\n\n:cx u 1 2 0\ndata: [DONE]\n\n";
        for (cut, wanted) in [
            (Cut { mark: 0, bytes: 0, hangs: false }, 3),
            (Cut { mark: 1, bytes: 0, hangs: false }, 28),
            (Cut { mark: 1, bytes: 19, hangs: false }, 47),
            (Cut { mark: 3, bytes: 2, hangs: false }, stream.len() - 6),
        ] {
            for size in 1..stream.len() {
                let mut knife = Knife::default();
                knife.arm([cut]);
                let mut passed = 0;
                for chunk in stream.chunks(size) {
                    let (pass, cut) = knife.pass(chunk);
                    passed += pass;
                    if cut.is_some() {
                        break;
                    }
                }
                assert_eq!(knife.made(), 1);
                assert!((wanted..wanted + MARK_BYTES).contains(&passed), "{cut:?} in chunks of {size}: {passed}");
            }
        }
    }
}
