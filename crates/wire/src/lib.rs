//! Bounded, total codecs: QEMU migration stream, QMP, channel frames, agent control.
