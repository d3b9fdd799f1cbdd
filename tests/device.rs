//! Devices as callers see them.

use alight::{Device, DeviceBuffer, Error};

#[test]
fn a_range_past_the_end_of_a_buffer_is_an_error_and_copies_nothing() {
    let mut buffer = Device::host().allocate(100).unwrap();
    let mut bytes = [7; 10];
    for offset in [91, 100, 101, u64::MAX - 9, u64::MAX] {
        let error = buffer.copy_from_host(offset, &bytes).unwrap_err();
        assert!(matches!(error, Error::Device { .. }), "{error}");
        assert!(buffer.copy_to_host(offset, &mut bytes).is_err());
    }
    assert_eq!((buffer.as_host(), bytes), (Some(&[0; 100][..]), [7; 10]));
}

#[test]
fn device_names_are_read_back() {
    let host: Device = "host".parse().unwrap();
    assert_eq!(host, Device::host());
    assert_eq!("cpu".parse::<Device>().unwrap(), host);
    assert_eq!((host.to_string(), format!("{host:?}")), ("host".into(), "Device(host)".into()));
    for text in ["", "Host", "cuda:", "cuda:-1", "cuda:x", "cuda:99999999999", "gpu"] {
        assert!(matches!(text.parse::<Device>(), Err(Error::InvalidOption { option: "device", .. })), "{text:?}");
    }
}

#[test]
fn handles_and_buffers_go_to_other_threads() {
    fn check<T: Send + Sync>() {}
    check::<Device>();
    check::<DeviceBuffer>();
    check::<alight::Tensor>();
}
