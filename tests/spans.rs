//! What a subscriber of `tracing` sees of a store.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use alight::{Device, Maintenance, Store};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// The spans of alight in the order in which they were made, each with its fields.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<Span>>>);

/// A name, and values by the names of their fields.
type Span = (&'static str, BTreeMap<&'static str, String>);

struct Fields<'f>(&'f mut BTreeMap<&'static str, String>);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

impl Subscriber for Spans {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span() && metadata.target() == "alight"
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut spans = self.0.lock().unwrap();
        let mut fields = BTreeMap::new();
        span.record(&mut Fields(&mut fields));
        spans.push((span.metadata().name(), fields));
        Id::from_u64(spans.len() as u64)
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        let mut spans = self.0.lock().unwrap();
        values.record(&mut Fields(&mut spans[span.into_u64() as usize - 1].1));
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn every_part_of_a_stores_life_has_a_span_with_its_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let spans = Spans::default();
    // Of all threads: the store has some of its own.
    tracing::subscriber::set_global_default(spans.clone()).unwrap();
    {
        let store = Store::options().create(true).maintenance(Maintenance::Inline).open(&path).unwrap();
        let large = vec![2; 3 << 20];
        let mut batch = store.batch();
        batch.put("a", &[1; 1000]).unwrap();
        batch.put("b", &large).unwrap();
        batch.commit().unwrap();
        store.get_many(["a", "b"], &Device::host()).unwrap();
        assert!(store.verify(|_| ()).unwrap().is_sound());
        store.close().unwrap();
    }
    let spans = spans.0.lock().unwrap();
    let field = |name: &str, field: &str| {
        let (_, fields) = spans.iter().find(|(span, _)| *span == name).unwrap_or_else(|| panic!("{name}: {spans:?}"));
        fields.get(field).unwrap_or_else(|| panic!("{name}.{field}: {fields:?}")).clone()
    };
    let bytes = ((3 << 20) + 1000).to_string();
    assert_eq!(field("open", "path"), path.display().to_string());
    assert_eq!(field("recovery", "commits"), "0");
    assert_eq!((field("commit", "keys"), field("commit", "bytes")), ("2".to_string(), bytes.clone()));
    assert_eq!((field("get_many", "keys"), field("get_many", "bytes")), ("2".to_string(), bytes));
    assert_eq!(field("get_many", "route"), "\"host\"");
    assert_eq!(field("verify", "keys"), "2");
    assert_eq!(field("flush", "keys"), "2");
}
