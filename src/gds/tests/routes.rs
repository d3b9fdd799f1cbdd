//! Which route serves, and what becomes of one that fails: over the simulated cuFile.

use std::path::Path;

use super::*;
use crate::cufile::simulated as library;
use crate::error::Error;
use crate::gds::metrics::GdsMetrics;
use crate::gds::router::Router;
use crate::gds::{
    CuFileTransport, Execute, IoOperation, Memory, OpenFile, Route, StagedTransport, Transfer, Transport,
};
use crate::io::fixtures::bytes;
use crate::storage::{FileStorage, OpenMode};

fn open(path: &Path) -> OpenFile {
    OpenFile { file: FileStorage::new().open(path, OpenMode::ReadWrite).unwrap(), path: path.into() }
}

/// A file of test bytes, in a folder that goes with it.
fn file() -> (tempfile::TempDir, OpenFile) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    std::fs::write(&path, bytes(0..MIB)).unwrap();
    let file = open(&path);
    (folder, file)
}

fn router(cufile: CuFileTransport, chosen: bool) -> (Router, Arc<GdsMetrics>) {
    let metrics = Arc::new(GdsMetrics::default());
    let staged: Arc<dyn Transport> = Arc::new(StagedTransport::new());
    let mut routes: Vec<(Arc<dyn Transport>, bool)> = vec![(staged, false)];
    routes.insert(usize::from(!chosen), (Arc::new(cufile), chosen));
    (Router::new(routes, ErrorRecovery::new(0, true), Arc::clone(&metrics)), metrics)
}

fn read(router: &Router, file: &OpenFile) {
    let memory = simulated().allocate(MIB).unwrap();
    let mut memory = Memory::Owned(memory);
    let transfer = Transfer::new(file.clone(), piece(0, 0, MIB));
    assert_eq!(router.execute(IoOperation::Read, &transfer, &mut memory).unwrap(), MIB);
    assert!(contents(&memory.into_owned().unwrap()) == bytes(0..MIB));
}

#[test]
fn cufile_is_first_where_it_goes_direct_and_behind_the_ring_where_not() {
    let (_folder, file) = file();
    for (cufile, direct) in [(library::cufile(), false), (library::cufile_with_direct_path(), true)] {
        let (router, metrics) = router(CuFileTransport::over(cufile), false);
        read(&router, &file);
        // Where the temporary directory is in memory there is nothing past the page cache, and so no direct path.
        let expected = if direct && file.file.direct() { Route::CuFile } else { Route::Staged };
        assert_eq!((metrics.route(expected).bytes_read(), metrics.fallbacks()), (MIB, 0), "{direct}");
    }
}

#[test]
fn a_cufile_that_fails_rests_and_the_ring_serves_and_that_is_counted() {
    let (_folder, file) = file();
    let (router, metrics) = router(CuFileTransport::over(library::cufile()), true);
    read(&router, &file);
    assert_eq!((metrics.route(Route::CuFile).bytes_read(), metrics.fallbacks()), (MIB, 0));
    library::set_mood(library::Mood { count: Some(-5044), ..library::Mood::default() });
    read(&router, &file);
    assert_eq!((metrics.route(Route::Staged).bytes_read(), metrics.fallbacks()), (MIB, 1));
    assert!(router.status()[0].resting, "{:?}", router.status());
    read(&router, &file);
    assert_eq!((metrics.route(Route::Staged).bytes_read(), metrics.fallbacks()), (2 * MIB, 2), "not asked again");
    // What is wrong with the file is no trouble of the route.
    let mut memory = Memory::Owned(simulated().allocate(MIB).unwrap());
    let past = Transfer::new(file.clone(), piece(10, 0, MIB));
    assert!(matches!(router.execute(IoOperation::Read, &past, &mut memory), Err(Error::FileTooShort { .. })));
}

#[test]
fn a_route_that_is_asked_for_comes_first_or_alone() {
    let device = simulated();
    let build = |with: fn(GdsBuilder) -> GdsBuilder| {
        let gds = with(builder(&device, FileStorage::new(), config())).build().unwrap();
        gds.routes().iter().map(|status| status.route).collect::<Vec<_>>()
    };
    let (staged, cufile, buffered) = (Route::Staged, Route::CuFile, Route::Buffered);
    assert_eq!(build(|builder| builder), [staged, cufile, buffered]);
    assert_eq!(build(|builder| builder.route(Route::CuFile)), [cufile, staged, buffered]);
    assert_eq!(build(|builder| builder.route(Route::Buffered)), [buffered, staged, cufile]);
    assert_eq!(build(|builder| builder.only(Route::CuFile)), [cufile]);
    let (_folder, file) = file();
    let host = builder(&Device::host(), FileStorage::new(), config());
    let gds = host.only(Route::CuFile).build().unwrap();
    let mut target = gds.device().allocate(10).unwrap();
    let error = gds.read_to_gpu(&file.path, piece(0, 0, 10), &mut target).unwrap_err();
    assert!(matches!(error, Error::RouteUnavailable { route: "cufile", .. }), "{error}");
    let gds = builder(&device, FileStorage::new(), config()).only(Route::Buffered).build().unwrap();
    let mut target = device.allocate(10).unwrap();
    gds.read_to_gpu(&file.path, piece(0, 0, 10), &mut target).unwrap();
    assert_eq!(gds.metrics().route(Route::Buffered).bytes_read(), 10);
}
