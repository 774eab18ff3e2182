//! Rings and interrupt coalescing of network cards, asked for over ethtool netlink.
//!
//! Read-only. A card, kernel or sandbox that does not answer is simply not in the result.

use crate::facts::NicRings;
use crate::tree::Tree;
use ethtool::{EthtoolAttr, EthtoolCoalesceAttr, EthtoolRingAttr};
use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;
use tokio_stream::StreamExt;

/// The kernel answers at once or not at all.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// What each real card says.
pub fn rings(tree: &dyn Tree) -> BTreeMap<String, NicRings> {
    let names = tree.list("/sys/class/net").into_iter();
    let nics: Vec<_> = names.filter(|nic| tree.exists(&format!("/sys/class/net/{nic}/device"))).collect();
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return BTreeMap::new();
    };
    runtime.block_on(async move {
        let mut found = BTreeMap::new();
        for nic in nics {
            let asked = tokio::time::timeout(ANSWER_MAX, ask(&nic)).await;
            found.extend(asked.ok().flatten().map(|rings| (nic, rings)));
        }
        found
    })
}

async fn ask(nic: &str) -> Option<NicRings> {
    let (connection, mut handle, _) = ethtool::new_connection().ok()?;
    let connection = tokio::spawn(connection);
    let mut rings = NicRings::default();
    let mut answered = false;
    if let Ok(stream) = handle.ring().get(Some(nic)).execute().await {
        let mut stream = pin!(stream);
        while let Some(Ok(message)) = stream.next().await {
            answered = true;
            message.payload.nlas.iter().for_each(|attribute| take(&mut rings, attribute));
        }
    }
    if let Ok(stream) = handle.coalesce().get(Some(nic)).execute().await {
        let mut stream = pin!(stream);
        while let Some(Ok(message)) = stream.next().await {
            answered = true;
            message.payload.nlas.iter().for_each(|attribute| take(&mut rings, attribute));
        }
    }
    connection.abort();
    answered.then_some(rings)
}

fn take(rings: &mut NicRings, attribute: &EthtoolAttr) {
    match attribute {
        EthtoolAttr::Ring(EthtoolRingAttr::Rx(n)) => rings.rx = *n,
        EthtoolAttr::Ring(EthtoolRingAttr::RxMax(n)) => rings.rx_max = *n,
        EthtoolAttr::Ring(EthtoolRingAttr::Tx(n)) => rings.tx = *n,
        EthtoolAttr::Ring(EthtoolRingAttr::TxMax(n)) => rings.tx_max = *n,
        EthtoolAttr::Coalesce(EthtoolCoalesceAttr::RxUsecs(n)) => rings.rx_usecs = Some(*n),
        EthtoolAttr::Coalesce(EthtoolCoalesceAttr::UseAdaptiveRx(on)) => rings.adaptive_rx = Some(*on),
        _ => {}
    }
}
