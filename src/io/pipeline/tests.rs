use super::*;
use crate::device::Device;
use crate::io::fixtures::{Gate, disk, open};
use crate::io::transport::Piece;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

/// Lets every operation pass a gate, and fails or panics where its piece says so.
#[derive(Default)]
struct Gated {
    gate: Gate,
    running: AtomicUsize,
    most: AtomicUsize,
}

const FAILS: u64 = 1 << 32;
const PANICS: u64 = 2 << 32;

impl Execute for Gated {
    fn execute(&self, _: IoOperation, transfer: &Transfer, _: &mut Memory) -> Result<u64> {
        self.most.fetch_max(self.running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        self.gate.pass();
        self.running.fetch_sub(1, Ordering::SeqCst);
        match transfer.pieces[0].file_offset {
            FAILS => Err(Error::Closed),
            PANICS => panic!("on purpose"),
            _ => Ok(transfer.len_bytes()),
        }
    }
}

fn request(offset: u64) -> IoRequest {
    let piece = Piece { file_offset: offset, buffer_offset: 0, len_bytes: 10 };
    IoRequest::read(Transfer::new(open(&disk(10)), piece), Device::host().allocate(10).unwrap())
}

fn pipeline(in_flight: usize, waiting: usize) -> (Arc<Gated>, AsyncIoPipeline) {
    let gated = Arc::new(Gated::default());
    (Arc::clone(&gated), AsyncIoPipeline::new(gated, in_flight, waiting))
}

#[test]
fn as_many_as_may_are_truly_in_flight_and_no_more() {
    let (gated, pipeline) = pipeline(8, 3);
    gated.gate.close();
    for n in 0..11 {
        pipeline.submit(request(n)).unwrap();
    }
    gated.gate.wait_for(8);
    assert_eq!((gated.gate.waiting(), pipeline.outstanding()), (8, 11));
    gated.gate.open();
    assert_eq!(pipeline.drain().len(), 11);
    assert_eq!((gated.most.load(Ordering::SeqCst), pipeline.outstanding()), (8, 0));
    assert!(pipeline.wait_one().is_none());
}

#[test]
fn who_brings_more_than_may_wait_waits() {
    let (gated, pipeline) = pipeline(1, 1);
    gated.gate.close();
    pipeline.submit(request(0)).unwrap();
    gated.gate.wait_for(1);
    pipeline.submit(request(1)).unwrap();
    let (sender, answers) = mpsc::channel();
    let late = request(2).with_callback(move |completion| sender.send(completion).unwrap());
    let until = Instant::now() + Duration::from_millis(20);
    assert!(matches!(pipeline.submit_until(late, Some(until)), Err(Error::Timeout { operation: "read", .. })));
    let completion = answers.recv().unwrap();
    assert!(matches!(completion.result, Err(Error::Timeout { .. })));
    assert_eq!(completion.memory.into_owned().unwrap().len_bytes(), 10, "its buffer comes back");
    std::thread::scope(|scope| {
        let blocked = scope.spawn(|| pipeline.submit(request(3)).unwrap());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!blocked.is_finished());
        gated.gate.open();
    });
    assert_eq!(pipeline.drain().len(), 3);
    assert_eq!(pipeline.waits(), 2);
}

#[test]
fn every_request_completes_once_whatever_becomes_of_it() {
    let (gated, pipeline) = pipeline(3, 4);
    let (sender, answers) = mpsc::channel();
    for n in 0..60u64 {
        let offset = [n, FAILS, PANICS][n as usize % 3];
        let sender = sender.clone();
        let request = request(offset).with_callback(move |completion| {
            let outcome = match &completion.result {
                Ok(10) => 0,
                Err(Error::Closed) => 1,
                Err(Error::Panicked { operation: "read", why }) if why == "on purpose" => 2,
                other => panic!("{other:?}"),
            };
            sender.send((completion.id, outcome)).unwrap();
            assert_ne!(outcome, 0, "a callback that panics harms nobody");
        });
        let id = pipeline.submit(request).unwrap();
        assert_eq!(id, RequestId(n));
    }
    assert!(pipeline.drain().is_empty(), "callbacks had them all");
    let mut all: Vec<_> = answers.try_iter().collect();
    all.sort();
    assert_eq!(all, (0..60).map(|n| (RequestId(n), n % 3)).collect::<Vec<_>>());
    assert!(gated.most.load(Ordering::SeqCst) <= 3);
}

#[test]
fn shutdown_cancels_what_waits_and_finishes_what_runs() {
    let (gated, pipeline) = pipeline(1, 3);
    gated.gate.close();
    pipeline.submit(request(0)).unwrap();
    gated.gate.wait_for(1);
    let (sender, answers) = mpsc::channel();
    for n in 1..4 {
        let sender = sender.clone();
        pipeline.submit(request(n).with_callback(move |completion| sender.send(completion).unwrap())).unwrap();
    }
    pipeline.close();
    for completion in answers.try_iter().take(3) {
        assert!(matches!(completion.result, Err(Error::Cancelled { operation: "read", .. })));
    }
    drop(sender);
    let refused = pipeline.submit(request(9));
    assert!(matches!(refused, Err(Error::Cancelled { .. })));
    gated.gate.open();
    let done = pipeline.shutdown();
    let ended: Vec<_> = done.iter().map(|completion| (completion.id.0, completion.result.is_ok())).collect();
    assert_eq!(ended, [(4, false), (0, true)]);
    assert!(answers.recv().is_err(), "nobody was called twice");
}

#[test]
fn dropping_it_waits_for_nothing_and_frees_nothing_in_flight() {
    let (gated, pipeline) = pipeline(2, 2);
    gated.gate.close();
    let (sender, answers) = mpsc::channel();
    for n in 0..4 {
        let sender = sender.clone();
        pipeline.submit(request(n).with_callback(move |completion| sender.send(completion).unwrap())).unwrap();
    }
    gated.gate.wait_for(2);
    drop(pipeline);
    assert_eq!(answers.try_iter().filter(|completion| completion.result.is_err()).count(), 2);
    gated.gate.open();
    drop(sender);
    let finished: Vec<_> = answers.iter().collect();
    assert_eq!(finished.len(), 2);
    assert!(finished.iter().all(|completion| completion.result.is_ok()), "what ran was done");
}

#[test]
fn a_waiter_may_give_up() {
    let (gated, pipeline) = pipeline(1, 1);
    gated.gate.close();
    let id = pipeline.submit(request(0)).unwrap();
    assert!(pipeline.wait_one_for(Duration::from_millis(10)).is_none());
    gated.gate.open();
    let completion = pipeline.wait_one().unwrap();
    assert_eq!((completion.id, completion.result.unwrap()), (id, 10));
    assert!(pipeline.wait_one_for(Duration::MAX).is_none(), "nothing is outstanding");
}

#[test]
fn many_threads_submit_and_wait_together() {
    let (_, pipeline) = pipeline(4, 2);
    let collected = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for n in 0..200 {
                    pipeline.submit(request(n)).unwrap();
                }
            });
            scope.spawn(|| {
                while collected.load(Ordering::SeqCst) < 800 {
                    if pipeline.wait_one_for(Duration::from_millis(1)).is_some() {
                        collected.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
        }
    });
    assert_eq!(pipeline.outstanding(), 0);
}
