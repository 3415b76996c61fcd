package xds

import (
	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// Convert brings resources into a store as one response of each type does.
func Convert(store *state.Store, addresses, policies []*discoverypb.Resource) error {
	if err := newAddresses(store).apply(addresses, nil, nil); err != nil {
		return err
	}
	if err := applyAuthorizations(store, policies, nil); err != nil {
		return err
	}
	return nil
}
