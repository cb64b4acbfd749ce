//! Quotes of a real software TPM, appraised.
#![allow(clippy::unwrap_used)]

mod support;

use attest::testkit::KeyShape;
use support::{Platform, binding, ready};

#[test]
fn a_fresh_quote_of_an_enrolled_platform_is_trusted() {
    if !ready(&[]) {
        return;
    }
    for shape in [KeyShape::Usual, KeyShape::RsaSsa, KeyShape::RsaPss] {
        let mut platform = Platform::with_key(shape);
        let question = binding("host-a", 1);
        let evidence = platform.evidence(&question);
        let appraised =
            platform.appraise(&question, &evidence).unwrap_or_else(|refusal| panic!("{shape:?}: {refusal}"));
        println!("{:#?}", appraised.appraisal());
    }
}
