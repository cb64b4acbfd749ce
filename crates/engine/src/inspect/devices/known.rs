//! What no dump of descriptions tells: descriptions that are not registered with a device type, the conditions of
//! conditional fields, and the counts of arrays that only run-time state has.
//!
//! Facts about QEMU 7.2 to 10.0, x86. What is not listed here is not guessed: a section with it has no layout.

use types::layout::When;

/// A description by hand.
#[derive(Debug)]
pub(super) struct Hand {
    pub(super) vmsd: &'static str,
    pub(super) version: u32,
    pub(super) parts: &'static [Part],
    pub(super) subs: &'static [Hand],
    /// Whether the destination knows it, but its fields are not told here.
    pub(super) opaque: bool,
}

/// A field by hand.
#[derive(Debug)]
pub(super) enum Part {
    /// One scalar or buffer.
    Bytes(&'static str, u32),
    /// Scalars: size and count.
    Array(&'static str, u32, u32),
    /// Structs.
    Structs(&'static str, &'static Hand, u32),
    /// Bytes that an earlier field counts: name, field, most.
    Counted(&'static str, &'static str, u32),
}

use Part::{Array, Bytes, Counted, Structs};

const fn hand(vmsd: &'static str, version: u32, parts: &'static [Part]) -> Hand {
    Hand { vmsd, version, parts, subs: &[], opaque: false }
}

const fn opaque(vmsd: &'static str) -> Hand {
    Hand { vmsd, version: 1, parts: &[], subs: &[], opaque: true }
}

const fn with_subs(vmsd: &'static str, subs: &'static [Hand]) -> Hand {
    Hand { vmsd, version: 0, parts: &[], subs, opaque: false }
}

/// Descriptions whose fields the dry run shows, and whose subsections are these.
const ROOTS: &[Hand] = &[
    with_subs("timer", &[opaque("timer/icount")]),
    with_subs("cpu_common", CPU_COMMON_SUBS),
    with_subs("cpu", CPU_SUBS),
    with_subs("apic", &[hand("apic_sipi", 1, &[Bytes("sipi_vector", 4), Bytes("wait_for_sipi", 4)])]),
    with_subs("PCIBUS", &[]),
    with_subs("i2c_bus", &[opaque("i2c_bus/broadcast")]),
    with_subs("acpi_build", &[]),
    with_subs("globalstate", &[]),
    // 7.2 leaves its IDE controllers out of the dump.
    with_subs("ide", &[]),
    with_subs("ide bmdma", BMDMA_SUBS),
];

/// The largest blob of a TPM emulator's state; swtpm's are under 16 KiB.
const MAX_TPM_BLOB_BYTES: u32 = 1 << 20;

/// Descriptions whose fields are these, whatever the dry run shows.
const WHOLE: &[Hand] = &[hand(
    "tpm-emulator",
    0,
    &[
        Bytes("state_blobs.permanent_flags", 4),
        Bytes("state_blobs.permanent.size", 4),
        Counted("state_blobs.permanent.buffer", "state_blobs.permanent.size", MAX_TPM_BLOB_BYTES),
        Bytes("state_blobs.volatil_flags", 4),
        Bytes("state_blobs.volatil.size", 4),
        Counted("state_blobs.volatil.buffer", "state_blobs.volatil.size", MAX_TPM_BLOB_BYTES),
        Bytes("state_blobs.savestate_flags", 4),
        Bytes("state_blobs.savestate.size", 4),
        Counted("state_blobs.savestate.buffer", "state_blobs.savestate.size", MAX_TPM_BLOB_BYTES),
    ],
)];

const BMDMA_SUBS: &[Hand] = &[
    hand(
        "ide bmdma_current",
        1,
        &[Bytes("cur_addr", 4), Bytes("cur_prd_last", 4), Bytes("cur_prd_addr", 4), Bytes("cur_prd_len", 4)],
    ),
    hand("ide bmdma/status", 1, &[Bytes("status", 1)]),
];

const CPU_COMMON_SUBS: &[Hand] = &[
    hand("cpu_common/exception_index", 1, &[Bytes("exception_index", 4)]),
    hand("cpu_common/crash_occurred", 1, &[Bytes("crash_occurred", 1)]),
];

macro_rules! words {
    ($name:literal: $($field:literal),+) => { hand($name, 1, &[$(Bytes($field, 8)),+]) };
}

/// In the order of QEMU 10.0; 7.2 has no more, in the same order.
const CPU_SUBS: &[Hand] = &[
    hand(
        "cpu/exception_info",
        1,
        &[
            Bytes("env.exception_pending", 1),
            Bytes("env.exception_injected", 1),
            Bytes("env.exception_has_payload", 1),
            Bytes("env.exception_payload", 8),
        ],
    ),
    words!("cpu/async_pf_msr": "env.async_pf_en_msr"),
    words!("cpu/async_pf_int_msr": "env.async_pf_int_msr"),
    words!("cpu/async_pv_eoi_msr": "env.pv_eoi_en_msr"),
    words!("cpu/steal_time_msr": "env.steal_time_msr"),
    words!("cpu/poll_control_msr": "env.poll_control_msr"),
    hand("cpu/fpop_ip_dp", 1, &[Bytes("env.fpop", 2), Bytes("env.fpip", 8), Bytes("env.fpdp", 8)]),
    words!("cpu/msr_tsc_adjust": "env.tsc_adjust"),
    words!("cpu/msr_tscdeadline": "env.tsc_deadline"),
    words!("cpu/msr_ia32_misc_enable": "env.msr_ia32_misc_enable"),
    words!("cpu/msr_ia32_feature_control": "env.msr_ia32_feature_control"),
    hand(
        "cpu/msr_architectural_pmu",
        1,
        &[
            Bytes("env.msr_fixed_ctr_ctrl", 8),
            Bytes("env.msr_global_ctrl", 8),
            Bytes("env.msr_global_status", 8),
            Bytes("env.msr_global_ovf_ctrl", 8),
            Array("env.msr_fixed_counters", 8, 3),
            Array("env.msr_gp_counters", 8, 18),
            Array("env.msr_gp_evtsel", 8, 18),
        ],
    ),
    hand(
        "cpu/mpx",
        1,
        &[
            Structs("env.bnd_regs", &BND_REG, 4),
            Bytes("env.bndcs_regs.cfgu", 8),
            Bytes("env.bndcs_regs.sts", 8),
            Bytes("env.msr_bndcfgs", 8),
        ],
    ),
    words!("cpu/msr_hyperv_hypercall": "env.msr_hv_guest_os_id", "env.msr_hv_hypercall"),
    words!("cpu/msr_hyperv_vapic": "env.msr_hv_vapic"),
    words!("cpu/msr_hyperv_time": "env.msr_hv_tsc"),
    hand("cpu/msr_hyperv_crash", 1, &[Array("env.msr_hv_crash_params", 8, 5)]),
    words!("cpu/msr_hyperv_runtime": "env.msr_hv_runtime"),
    hand(
        "cpu/msr_hyperv_synic",
        1,
        &[
            Bytes("env.msr_hv_synic_control", 8),
            Bytes("env.msr_hv_synic_evt_page", 8),
            Bytes("env.msr_hv_synic_msg_page", 8),
            Array("env.msr_hv_synic_sint", 8, 16),
        ],
    ),
    hand(
        "cpu/msr_hyperv_stimer",
        1,
        &[Array("env.msr_hv_stimer_config", 8, 4), Array("env.msr_hv_stimer_count", 8, 4)],
    ),
    words!("cpu/msr_hyperv_reenlightenment":
        "env.msr_hv_reenlightenment_control", "env.msr_hv_tsc_emulation_control",
        "env.msr_hv_tsc_emulation_status"),
    hand(
        "cpu/avx512",
        1,
        &[
            Array("env.opmask_regs", 8, 8),
            Structs("env.xmm_regs", &ZMMH_REG, 16),
            Structs("env.xmm_regs", &HI16_ZMM_REG, 16),
        ],
    ),
    words!("cpu/xss": "env.xss"),
    hand("cpu/umwait", 1, &[Bytes("env.umwait", 4)]),
    words!("cpu/tsc_khz": "env.tsc_khz"),
    words!("cpu/msr_smi_count": "env.msr_smi_count"),
    hand("cpu/pkru", 1, &[Bytes("env.pkru", 4)]),
    hand("cpu/pkrs", 1, &[Bytes("env.pkrs", 4)]),
    words!("cpu/spec_ctrl": "env.spec_ctrl"),
    words!("cpu/amd_tsc_scale_msr": "env.amd_tsc_scale_msr"),
    words!("cpu/mcg_ext_ctl": "env.mcg_ext_ctl"),
    hand(
        "cpu/intel_pt",
        1,
        &[
            Bytes("env.msr_rtit_ctrl", 8),
            Bytes("env.msr_rtit_status", 8),
            Bytes("env.msr_rtit_output_base", 8),
            Bytes("env.msr_rtit_output_mask", 8),
            Bytes("env.msr_rtit_cr3_match", 8),
            Array("env.msr_rtit_addrs", 8, 8),
        ],
    ),
    words!("cpu/virt_ssbd": "env.virt_ssbd"),
    hand("cpu/svn_npt", 1, &[Bytes("env.nested_cr3", 8), Bytes("env.nested_pg_mode", 4)]),
    hand("cpu/svm_guest", 1, &[Bytes("env.int_ctl", 4)]),
    opaque("cpu/nested_state"),
    opaque("cpu/xen_vcpu"),
    hand("cpu/msr_tsx_ctrl", 1, &[Bytes("env.tsx_ctrl", 4)]),
    hand("cpu/intel_sgx", 1, &[Array("env.msr_ia32_sgxlepubkeyhash", 8, 4)]),
    hand("cpu/pdptrs", 1, &[Array("env.pdptrs", 8, 4)]),
    words!("cpu/msr_xfd": "env.msr_xfd", "env.msr_xfd_err"),
    hand("cpu/intel_amx_xtile", 1, &[Array("env.xtilecfg", 1, 64), Array("env.xtiledata", 1, 8192)]),
    hand(
        "cpu/arch_lbr",
        1,
        &[Bytes("env.msr_lbr_ctl", 8), Bytes("env.msr_lbr_depth", 8), Structs("env.lbr_records", &LBR, 32)],
    ),
    hand("cpu/triple_fault", 1, &[Bytes("env.triple_fault_pending", 1)]),
];

const BND_REG: Hand = hand("bnd_regs", 1, &[Bytes("lb", 8), Bytes("ub", 8)]);
const ZMMH_REG: Hand = hand("zmmh_reg", 1, &[Array("_q_ZMMReg", 8, 4)]);
const HI16_ZMM_REG: Hand = hand("Hi16_ZMM_reg", 1, &[Array("_q_ZMMReg", 8, 8)]);
const LBR: Hand = hand("lbr_records_vars", 1, &[Bytes("from", 8), Bytes("to", 8), Bytes("info", 8)]);

/// The subsections of a description that only its code registers.
pub(super) fn root(vmsd: &str) -> Option<&'static Hand> {
    ROOTS.iter().find(|hand| hand.vmsd == vmsd)
}

/// A description that is known as a whole.
pub(super) fn whole(vmsd: &str) -> Option<&'static Hand> {
    WHOLE.iter().find(|hand| hand.vmsd == vmsd)
}

/// When a conditional field is there.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// The device's properties and the machine type decide: as in the dry run, always.
    Fixed,
    /// Its state decides.
    State(When),
}

/// Conditional fields whose presence the device's properties and the machine type decide.
const FIXED: &[(&str, &str)] = &[
    ("PCIDevice", "config"),
    ("ac97", "unused"),
    ("e1000", "unused"),
    ("e1000e", "core.timadj"),
    ("fw_cfg", "cur_offset"),
    ("ich9_smb", "irq_enabled"),
    ("ich9_smb", "smb"),
    ("ipmi-interface-kcs", "unused"),
    ("pci_bridge", "shpc"),
    ("pcie-root-port", "parent_obj.parent_obj.parent_obj.parent_obj"),
    ("pcnet", "unused"),
    ("piix4_pm", "acpi_pci_hotplug.acpi_index"),
    ("piix4_pm", "acpi_pci_hotplug.acpi_pcihp_pci_status"),
    ("piix4_pm", "acpi_pci_hotplug.acpi_pcihp_pci_status[0x0]"),
    ("piix4_pm", "acpi_pci_hotplug.hotplug_select"),
    ("piix4_pm", "smb"),
    ("pvscsi", "parent_obj"),
    ("xhci-intr", "ev_buffer"),
    ("xhci-intr", "ev_buffer_get"),
    ("xhci-intr", "ev_buffer_put"),
];

/// The condition of a conditional field, if it is known.
pub(super) fn condition(vmsd: &str, field: &str) -> Option<Condition> {
    if (vmsd, field) == ("ide_drive", "identify_data") {
        return Some(Condition::State(When::NotZero("identify_set".to_owned())));
    }
    FIXED.contains(&(vmsd, field)).then_some(Condition::Fixed)
}

/// Arrays in subsections that the dry run need not have: elements.
const COUNTS: &[(&str, &str, u32)] = &[
    ("ICH9LPC/smi_feat", "smi_guest_features_le", 8),
    ("SCSIDevice/sense", "sense", 156),
    ("e1000/full_mac_state", "mac_reg", 0x8000),
    ("ich9_pm/pcihp", "acpi_pci_hotplug.acpi_pcihp_pci_status", 256),
    ("ide_drive/pio_state", "io_buffer", 256 * 512 + 4),
    ("Fifo8", "data", 16),
];

/// How many elements an array has that no dump counts.
pub(super) fn count(vmsd: &str, field: &str) -> Option<u32> {
    COUNTS.iter().find(|(v, f, _)| (*v, *f) == (vmsd, field)).map(|(_, _, count)| *count)
}

/// Structs that an earlier field counts: that field, and the most.
pub(super) fn counted(vmsd: &str, field: &str) -> Option<(&'static str, u32)> {
    const MAX_LOGGED_ERRORS: u32 = 128;
    ((vmsd, field) == ("PCIE_AER_ERROR_LOG", "log")).then_some(("log_num", MAX_LOGGED_ERRORS))
}

/// Arrays with an element for each CPU that the machine can have.
pub(super) fn one_for_each_cpu(vmsd: &str, field: &str) -> bool {
    (vmsd, field) == ("CPU hotplug state", "devs")
}

/// Buffers and arrays that the dump shows without a size, or whose number only the device's properties decide.
pub(super) fn sized_by_properties(vmsd: &str, field: &str) -> bool {
    matches!(
        (vmsd, field),
        ("Fifo8", "data")
            | ("sdhci", "fifo_buffer")
            | ("pflash_cfi01_blk_write", "blk_bytes")
            | ("memory hotplug state", "devs")
            | ("msix", "msix")
    )
}

/// Types of fields that are so many bytes, whatever they hold.
pub(super) fn is_plain(kind: &str) -> bool {
    let base = kind.strip_suffix(" equal").or_else(|| kind.strip_suffix(" le")).unwrap_or(kind);
    matches!(
        base,
        "bool"
            | "int8"
            | "int16"
            | "int32"
            | "int64"
            | "uint8"
            | "uint16"
            | "uint32"
            | "uint64"
            | "timer"
            | "buffer"
            | "unused_buffer"
            | "CPU_Double_U"
            | "float64"
            | "pci irq state"
            | "msix state"
            | "bitmap"
    )
}
